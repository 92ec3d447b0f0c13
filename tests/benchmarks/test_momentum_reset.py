"""With the momentum reset, exactly the selected entries move; without it, momentum moves others too."""

import pytest
import torch

from gmt_tune import GradientMask
from benchmarks.quality.momentum_reset import MomentumResetMask


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
