"""What counts as a gradient that is not finite. Whole runs that meet one are in tests/recipes/test_interruptions.py."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.run.gradients import FiniteCheck, StepCheck


def test_gradients_may_be_on_the_cpu_and_the_loss_on_a_gpu(monkeypatch):
    """As with fsdp_cpu_offload."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    loss = torch.zeros((), device="meta")  # stands for the GPU
    flags = [torch.tensor(False), torch.tensor(True)]
    check = StepCheck(1, [], loss, loss, loss, ["a", "b"], flags)
    bad = check.on_any_rank()
    assert bad.device == loss.device and bad.shape == ()


@pytest.mark.parametrize("entry", [0, 1], ids=["selected", "not selected"])
@pytest.mark.parametrize("is_due", [False, True])
def test_what_a_compact_optimizer_has_taken_in_counts(entry, is_due, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(0, own))
    model = nn.Linear(4, 1, bias=False)
    optimizer = CompactAdamW(model.parameters())
    mask = GradientMask(model.named_parameters(), density=0.25, refresh_every=1 if is_due else None)
    mask.register(optimizer)
    check = FiniteCheck(
        model, [optimizer], skips=True, rows_of=lambda batches: [7], in_words=lambda rows: f"rows {rows}",
        checkpoints=None, max_seq_len=None,
    )  # fmt: skip

    def backward(*grad):
        (model.weight * torch.tensor(grad)).sum().backward()
        check.note_loss(torch.tensor(1.0))
        return check.allows_step(1, torch.tensor(1.0), torch.tensor(2), [])

    assert backward(3.0, 1.0, 1.0, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    for values, allows in (([1.0] * 4, True), ([math.nan if i == entry else 1.0 for i in range(4)], False)):
        assert backward(*values) is allows
        assert (model.weight.grad is None) is not is_due
    optimizer.zero_grad()
    assert backward(3.0, 1.0, 1.0, 1.0) and check.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("loss", "entry", "message"),
    [
        (1.0, 1e30, None),  # whose square is too large for the norm, and which is finite all the same
        (1.0, math.nan, r"the gradient of 'weight' \(and of 1 more\) holds NaN or infinity at step 3, rows \[7\]"),
        (1.0, -math.inf, r"the gradient of 'weight' \(and of 1 more\) holds NaN or infinity at step 3, rows \[7\]"),
        (math.nan, 1.0, r"the loss holds NaN or infinity at step 3, rows \[7\]; no weight was changed"),
    ],
)
def test_only_what_is_not_finite_is_refused(dtype, loss, entry, message, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(0, own))
    model = nn.Linear(300, 4).to(dtype)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.grad.view(-1)[-1] = entry
    check = FiniteCheck(
        model, skips=False, rows_of=lambda batches: [7], in_words=lambda rows: f"rows {rows}",
        checkpoints=SimpleNamespace(finish=lambda: None, last_saved=None), max_seq_len=None,
    )  # fmt: skip
    losses = torch.tensor(loss), torch.tensor(2)
    check.note_loss(losses[0])
    if message is None:
        assert check.allows_step(3, *losses, [])
    else:
        with pytest.raises(UserError, match=message):
            check.allows_step(3, *losses, [])
