"""Shards of flat tensors, by themselves; ``test_sharded.py`` has them on several processes."""

import pytest
import torch

from gmt_tune import GradientMask
from gmt_tune.masking.flat import FlatShard


@pytest.fixture
def flat():
    """A flat tensor that a layer's weight lies in, from its third entry on."""
    flat = torch.nn.Parameter(torch.arange(10.0))
    flat.grad = torch.arange(10.0) - 4
    return flat


def test_a_shard_shares_the_flat_tensors_memory(flat):
    shard = FlatShard(flat, 2, 20, (5, 9))
    assert shard.shape == (20,) and shard.requires_grad and shard.local.tolist() == [2, 3, 4, 5]
    shard.grad.local.zero_()
    assert flat.grad.tolist() == [-4, -3, 0, 0, 0, 0, 2, 3, 4, 5]
    flat.grad = None
    assert shard.grad is None


def test_entry_by_entry_operations_give_shards(flat):
    shard = FlatShard(flat, 2, 20, (5, 9))
    score = (shard.grad * shard.detach()).abs().float() / 2
    assert isinstance(score, FlatShard) and score.shape == (20,) and score.local.tolist() == [2, 1.5, 0, 2.5]


@pytest.mark.parametrize(
    "needs_the_whole",
    [torch.mean, torch.norm, lambda t: t[:3], lambda t: t * torch.ones(2, 4)],
    ids=["mean", "norm", "some", "another shape"],
)
def test_a_score_of_the_whole_tensor_is_refused(flat, needs_the_whole):
    class OwnScore(GradientMask):
        def compute_score(self, name, parameter, grad):
            return grad / needs_the_whole(grad)

    weight = torch.nn.Parameter(torch.zeros(4, 5))
    mask = OwnScore([("weight", weight)], density=0.5)
    optimizer = torch.optim.SGD([flat], lr=0.1)
    mask.register(optimizer, shards={weight: FlatShard(flat, 2, 20, (5, 9))})
    with pytest.raises((NotImplementedError, RuntimeError), match="needs a whole tensor|must match"):
        optimizer.step()


def test_parameters_in_a_flat_tensor_that_the_mask_does_not_know_are_refused(flat):
    weight, other = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    shards = {weight: FlatShard(flat, 0, 4, (0, 4)), other: FlatShard(flat, 4, 4, (0, 4))}
    optimizer = torch.optim.SGD([flat], lr=0.1)
    with pytest.raises(ValueError, match="parameters that the gradient mask does not know .parameter 1 of group 0"):
        GradientMask([("weight", weight)], density=0.5).register(optimizer, shards=shards)


def test_a_mask_moves_from_one_flat_tensor_to_another(flat):
    """As when a model is trained again, with a new engine."""
    weight = torch.nn.Parameter(torch.zeros(2, 5))
    mask = GradientMask([("weight", weight)], density=0.2)
    for _ in range(2):
        flat.grad = torch.arange(10.0)
        optimizer = torch.optim.SGD([flat], lr=0.1)
        handle = mask.register(optimizer, shards={weight: FlatShard(flat, 0, 10, (0, 10))})
        optimizer.step()
        handle.remove()
        assert flat.grad.tolist() == [0] * 8 + [8, 9]
        flat = torch.nn.Parameter(torch.ones(10))
    assert mask.step == 2


def test_two_masks_of_one_flat_tensor_are_refused(flat):
    weight = torch.nn.Parameter(torch.zeros(2, 5))
    optimizer = torch.optim.SGD([flat], lr=0.1)
    first, second = (GradientMask([("weight", weight)], density=0.2) for _ in range(2))
    first.register(optimizer, shards={weight: FlatShard(flat, 0, 10, (0, 10))})
    for mask, sentence in ((first, "this mask is registered"), (second, "another gradient mask of the same")):
        with pytest.raises(ValueError, match=sentence):
            mask.register(optimizer, shards={weight: FlatShard(flat, 0, 10, (0, 10))})


def test_deepspeeds_optimizers_name_what_registers_them():
    class DeepSpeedZeroOptimizer:
        __module__ = "deepspeed.runtime.zero.stage_1_and_2"

    mask = GradientMask(torch.nn.Linear(2, 2).named_parameters(), density=0.5)
    with pytest.raises(TypeError, match=r"use gmt_tune.integrations.deepspeed.register\(mask, engine\)"):
        mask.register(DeepSpeedZeroOptimizer())
