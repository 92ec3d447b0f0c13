"""A GPU keeps the entries that a full sort of the same gradients keeps. The CPU shows that the tests hold."""

import full_sort
import pytest
import torch

from gmt_tune import GradientMask, mask_grads_

SHAPES = [(1 << 20,), (513, 257), (64, 3, 5), (1,)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_gpu)]


def parameters_on(device: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in SHAPES:
        grad = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.3)
        p = torch.nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        p.grad = grad.to(device, dtype)
        parameters.append(p)
    return parameters


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("density", [0.001, 0.2])
def test_mask_equals_full_sort(device, dtype, scope, density):
    parameters = parameters_on(device, dtype)
    wanted = full_sort.mask([p.grad.cpu() for p in parameters], density, scope)
    statistics = mask_grads_(parameters, density, scope=scope)
    for i, (p, want) in enumerate(zip(parameters, wanted, strict=True)):
        assert full_sort.same_bits(p.grad.cpu(), want)
        assert int(statistics.selected[str(i)]) == int((want != 0).sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimizer_moves_the_entries_of_the_full_sort(device, dtype):
    parameters = parameters_on(device, dtype)
    selected = [want != 0 for want in full_sort.mask([p.grad.cpu() for p in parameters], 0.2)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    GradientMask([(str(i), p) for i, p in enumerate(parameters)], density=0.2).register(optimizer)
    optimizer.step()
    for p, moves in zip(parameters, selected, strict=True):
        assert torch.equal(p.detach().cpu() != 0, moves)
