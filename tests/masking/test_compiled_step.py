"""``torch.compile(optimizer.step)``: the mask acts in it, and it is compiled once."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from gmt_tune import GradientMask
from gmt_tune.masking.tracker import SelectionTracker


def train(compiles: bool, mask_class=GradientMask, **policy):
    """Six steps: the mask, its tracker, the weights, and how many graphs had been compiled after each step."""
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mask = mask_class(model.named_parameters(), 0.25, **policy)
    mask.register(optimizer)
    tracker = SelectionTracker(mask)
    tracker.register(optimizer)
    graphs = CompileCounter()
    step = torch.compile(optimizer.step, backend=graphs) if compiles else optimizer.step
    counts = []
    for _ in range(6):
        model(torch.randn(4, 16)).square().sum().backward()
        step()
        optimizer.zero_grad()
        counts.append(graphs.frame_count)
    return mask, tracker, [p.detach() for p in model.parameters()], counts


@pytest.mark.parametrize("policy", [{}, {"refresh_every": 2, "score": "saliency"}, {"score": "random"}], ids=str)
def test_a_compiled_step_is_one_graph_that_is_compiled_once(policy):
    torch._dynamo.reset()
    mask, tracker, weights, counts = train(compiles=True, **policy)
    assert counts == [1] * 6
    wanted_mask, wanted_tracker, wanted, _ = train(compiles=False, **policy)
    assert mask.step == 6 and mask.statistics.read().selected == wanted_mask.statistics.read().selected
    assert tracker.metrics() == wanted_tracker.metrics() != {}
    for found, weight in zip(weights, wanted, strict=True):
        torch.testing.assert_close(found, weight)


def test_a_score_that_is_compiled_stays_compiled_in_it():
    torch._dynamo.reset()
    graphs = CompileCounter()
    product = torch.compile(lambda a, b: a * b.detach(), backend=graphs, dynamic=False)

    class Compiled(GradientMask):
        def compute_score(self, name, parameter, grad):
            return product(grad, parameter)

    train(compiles=False, mask_class=Compiled)
    assert graphs.frame_count == 2  # of a matrix and a vector
