"""With the momentum reset, exactly the selected entries move; without it, momentum moves others too."""

import pytest
import torch

from benchmarks.quality.momentum_reset import MomentumResetMask
from gmt_tune import GradientMask


def _moved_and_selected(mask_class, optimizer_class=torch.optim.AdamW, steps=4, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16, bias=False)
    optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
    mask = mask_class(model.named_parameters(), density=0.25)
    handle = mask.register(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        (model(torch.randn(3, 16)) * torch.randn(3, 16)).sum().backward()
        before = model.weight.detach().clone()
        optimizer.step()
    return model.weight != before, model.weight.grad != 0, handle, model, optimizer


def test_exactly_the_selected_entries_move():
    moved, selected, *_ = _moved_and_selected(MomentumResetMask, weight_decay=0.0)
    assert torch.equal(moved, selected)
    assert 64 <= selected.sum() < 80


def test_without_the_reset_momentum_moves_others_too():
    moved, selected, *_ = _moved_and_selected(GradientMask, weight_decay=0.0)
    assert (moved & ~selected).any()


def test_removing_the_handle_ends_both_masking_and_reset():
    _, _, handle, model, optimizer = _moved_and_selected(MomentumResetMask, weight_decay=0.0)
    handle.remove()
    model.weight.grad = torch.zeros_like(model.weight)
    moment = optimizer.state[model.weight]["exp_avg"].clone()
    optimizer.step()
    assert torch.allclose(optimizer.state[model.weight]["exp_avg"], 0.9 * moment)


def test_an_optimizer_without_a_first_moment_is_refused():
    with pytest.raises(TypeError, match="use torch.optim.AdamW"):
        _moved_and_selected(MomentumResetMask, torch.optim.RMSprop)


def test_an_unselected_weight_stands_still_also_where_a_closure_computes_the_gradient():
    moved = []
    for with_closure in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))

        def backward(model=model):
            loss = model(torch.randn(8, 20, generator=torch.Generator().manual_seed(1))).square().mean()
            loss.backward()
            return loss.detach()

        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        mask = MomentumResetMask(model.named_parameters(), density=0.1)
        mask.register(optimizer)
        moved.append([])
        for _ in range(3):
            before = model[0].weight.detach().clone()
            optimizer.zero_grad()
            if with_closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            moved[-1].append((model[0].weight != before).sum().item())
    assert moved[0] == moved[1] == [60, 60, 60]
