"""Half fine-tuning: the frozen half stands still, whatever momentum and weight decay would do, and is redrawn."""

import pytest
import torch
from torch import nn

from benchmarks.quality.half_mask import HalfMask


def _model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(6, 6, bias=False) for _ in range(8)]
    return torch.nn.Sequential(*layers, torch.nn.LayerNorm(6), torch.nn.Linear(6, 3, bias=False))


def _step(model, optimizer, seed: int) -> None:
    optimizer.zero_grad()
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().mean().backward()
    optimizer.step()


def _train(model, steps: range, mask_state=None, optimizer_state=None, **options):
    """Train; returns the mask, the optimizer, and for each step the names of the tensors that moved."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    mask = HalfMask(model.named_parameters(), dense=["8.*"], **options)
    if mask_state is not None:
        mask.load_state_dict(mask_state)
        optimizer.load_state_dict(optimizer_state)
    mask.register(optimizer)
    moved = []
    for step in steps:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        _step(model, optimizer, step)
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    return mask, optimizer, moved


def test_half_of_the_matrices_stand_still_bit_for_bit_and_the_half_changes_at_the_interval():
    _, _, moved = _train(_model(), range(9), refresh_every=3)
    for step in moved:
        assert {"8.weight", "8.bias"} <= step
        assert len([name for name in step if name[:2] in ("0.", "1.", "2.", "3.", "4.", "5.", "6.", "7.")]) == 4
    assert moved[0] == moved[1] == moved[2] != moved[3] == moved[4] == moved[5] != moved[6]


def test_what_moves_moves_as_without_a_mask():
    masked, plain = _model(), _model()
    _, _, moved = _train(masked, range(1), refresh_every=None)
    _step(plain, torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1), 0)
    for (name, one), other in zip(masked.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other) == (name in moved[0])


def test_over_many_draws_every_tensor_is_frozen_half_of_the_time():
    mask = HalfMask(_model().named_parameters(), seed=3)
    draws = [mask.updated(draw) for draw in range(400)]
    assert len(mask.masked_parameters) > 8
    for name in mask.masked_parameters:
        share = sum(name in drawn for drawn in draws) / len(draws)
        assert abs(share - 0.5) < 4 * 0.5 / 400**0.5, name
    assert all(sum(name.startswith(tuple("01234567")) for name in drawn) == 4 for drawn in draws)


def test_resumed_training_equals_uninterrupted_training():
    whole, first = _model(), _model()
    _, _, moved = _train(whole, range(10), refresh_every=4, seed=5)
    mask, optimizer, _ = _train(first, range(6), refresh_every=4, seed=5)
    second = _model(seed=1)
    second.load_state_dict(first.state_dict())
    _, _, moved_later = _train(second, range(6, 10), mask.state_dict(), optimizer.state_dict(), refresh_every=4, seed=5)
    assert moved_later == moved[6:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_statistics_count_whole_tensors_and_other_masks_are_refused():
    model = _model()
    mask, _, moved = _train(model, range(1))
    frozen = {name for name, count in mask.statistics.selected.items() if count == 0}
    assert frozen == set(mask.masked_parameters) - moved[0]
    assert mask.metrics()["mask/density"] == pytest.approx(
        sum(p.numel() for name, p in mask.masked_parameters.items() if name in moved[0])
        / sum(p.numel() for p in mask.masked_parameters.values())
    )
    from gmt_tune import GradientMask

    random_half = GradientMask(model.named_parameters(), 0.5, score="random", refresh_every=100, dense=["8.*"])
    with pytest.raises(ValueError, match="unit is 'tensor'"):
        mask.load_state_dict(random_half.state_dict())


def test_a_gradient_that_is_not_finite_is_named():
    model = _model()
    mask = HalfMask(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[3].weight.grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="3.weight"):
        mask.mask_grads_()


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_training_freezes_the_same_tensors(one_process_group):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    whole, sharded = _model(), _model()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    _train(whole, range(4), refresh_every=2)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.01, weight_decay=0.1)
    mask = HalfMask(sharded.named_parameters(), dense=["8.*"], refresh_every=2)
    mask.register(optimizer)
    for step in range(4):
        _step(sharded, optimizer, step)
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(one, other.full_tensor())


def test_a_layer_that_is_unfrozen_later_joins_the_draw_and_a_resumed_run_draws_the_same():
    def make(is_frozen: bool):
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
        model[0].requires_grad_(not is_frozen)
        return model, HalfMask(model.named_parameters(), refresh_every=1)

    model, mask = make(is_frozen=True)
    drawn = []
    for step in range(12):
        if step == 1:
            model[0].requires_grad_(True)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        mask.mask_grads_()
        drawn.append([p.grad is not None for p in model.parameters()])
    assert 2 <= sum(updated[0] for updated in drawn) <= 10
    other, resumed = make(is_frozen=False)
    resumed.load_state_dict({**mask.state_dict(), "steps": dict.fromkeys(mask.state_dict()["steps"], 5)})
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    resumed.mask_grads_()
    # The unfrozen layer's own count is one behind in the first mask
    assert [p.grad is not None for p in list(other.parameters())[1:]] == drawn[5][1:]
