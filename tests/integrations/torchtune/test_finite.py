"""Where the loss and the gradients are not on the same device."""

import torch

from gmt_tune.integrations.torchtune.run.finite import _are_bad


def test_gradients_may_be_on_the_cpu_and_the_loss_on_a_gpu():
    """As with fsdp_cpu_offload."""
    loss = torch.zeros((), device="meta", dtype=torch.bfloat16)  # stands for the GPU
    bad = _are_bad(loss, [torch.zeros(()), torch.zeros(())])
    assert bad.device == loss.device and bad.shape == (3,) and bad.dtype == torch.bool


def test_loss_and_sums_are_told_apart():
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    assert _are_bad(one, [one, nan]).tolist() == [False, False, True]
    assert _are_bad(nan, []).tolist() == [True]
