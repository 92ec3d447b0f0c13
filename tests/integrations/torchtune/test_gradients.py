"""What counts as a gradient that is not finite. Whole runs that meet one are in tests/recipes/test_interruptions.py."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.run.gradients import FiniteCheck, may_be_bad


def test_gradients_may_be_on_the_cpu_and_the_loss_on_a_gpu():
    """As with fsdp_cpu_offload."""
    loss = torch.zeros((), device="meta")  # stands for the GPU
    bad = may_be_bad(loss, [torch.zeros(3), torch.zeros((), dtype=torch.bfloat16)])
    assert bad.device == loss.device and bad.shape == () and bad.dtype == torch.bool


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
        model, skips=False, rows_of_step=lambda: [7], in_words=lambda rows: f"rows {rows}",
        checkpoints=SimpleNamespace(finish=lambda: None, last_saved=None), max_seq_len=None,
    )  # fmt: skip
    losses = torch.tensor(loss), torch.tensor(2)
    check.note_loss(losses[0])
    if message is None:
        assert check.allows_step(3, *losses)
    else:
        with pytest.raises(UserError, match=message):
            check.allows_step(3, *losses)
