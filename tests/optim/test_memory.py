"""What CompactAdamW keeps between two steps, counted over all tensors that are alive."""

import contextlib
import gc
import math

import pytest
import torch
from torch import nn

from gmt_tune import CompactAdamW, GradientMask


def bytes_alive() -> dict[int, int]:
    """By address, the memory of all tensors, those inside of torchao's classes too."""
    gc.collect()
    memories = {}
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, nn.Parameter):
            with contextlib.suppress(NotImplementedError):  # an undefined one, which torch 2.6 leaves about
                memory = tensor.untyped_storage()
                memories[memory.data_ptr()] = memory.nbytes()
    return memories


@pytest.mark.parametrize("density, most", [(0.05, 0.45), (0.2, 1.3)])
def test_bytes_per_parameter_between_two_steps(density, most):
    torch.manual_seed(0)
    before = bytes_alive()
    layers = [nn.Linear(2048, 2560, bias=False, dtype=torch.bfloat16) for _ in range(9)]
    model = nn.Sequential(*layers, nn.LayerNorm(2560, dtype=torch.bfloat16))
    entries = sum(p.numel() for p in model.parameters())
    assert entries == pytest.approx(47e6, rel=0.01)
    mask = GradientMask(model.named_parameters(), density, refresh_every=3, dense=["9.*"])
    optimizer = CompactAdamW(model.parameters(), state_bits=8)
    mask.register(optimizer)
    x = torch.randn(2, 2048, dtype=torch.bfloat16)
    for _ in range(4):  # every tensor has had its turn
        model[-1](sum(layer(x) for layer in layers)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.state) == 11
    kept = sum(size for address, size in bytes_alive().items() if address not in before)
    kept -= sum(p.numel() * p.element_size() for p in model.parameters()) + x.numel() * x.element_size()
    selected = sum(math.floor(density * layer.weight.numel()) for layer in layers)
    assert 4 * selected < kept <= most * entries  # moments and ages at the least
