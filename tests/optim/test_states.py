"""Moments in 8 bits, read and written by looking up: the same as torchao's own search, bit for bit."""

import pytest
import torch
from torchao.optim.quant_utils import quantize_8bit_with_qmap

from gmt_tune.optim import states


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_that_torchao_searches_for(signed):
    torch.manual_seed(0)
    qmap = states.zeros((4096,), 8, signed=signed, device=torch.device("cpu")).qmap
    *_, next_from = states.code_table(signed, torch.device("cpu"))
    changes = next_from[next_from.isfinite()]
    assert len(changes) > 200
    beside = [torch.nextafter(changes, torch.tensor(end)) for end in (-2.0, 2.0)]
    spread = torch.rand(1 << 18) ** torch.randint(1, 30, (1 << 18,)) * (torch.randn(1 << 18).sign() if signed else 1)
    values = torch.cat([changes, *beside, qmap, spread, torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30])])
    wanted = quantize_8bit_with_qmap(values, qmap)
    assert len(wanted.unique()) == 256 - (not signed) * int((qmap < 0).sum())
    assert torch.equal(states._nearest_codes(values, signed), wanted)


@pytest.mark.parametrize("bits", [32, 8, 4, "fp8"])
def test_pieces_are_read_and_written_as_whole_moments_are(bits):
    torch.manual_seed(0)
    values = torch.randn(1 << 17) * torch.randn(1 << 17).exp()
    whole, pieces = (states.zeros(values.shape, bits, signed=True, device=values.device) for _ in range(2))
    whole.copy_(values)
    states.fill_(pieces, values)
    wanted = whole if bits == 32 else whole.dequantize()
    part = slice(512, 4096)
    assert torch.equal(states.read(pieces, slice(0, 1 << 17)), wanted) and wanted.abs().sum() > 0
    assert torch.equal(states.read(pieces, part), wanted[part])
    near, first = states.read_near(pieces, slice(600, 1025))
    assert first <= 600 and torch.equal(near[600 - first :][:425], wanted[600:1025])


def test_steps_of_dense_parameters_are_where_the_parameters_are():
    # On the CPU all is in one place; the meta device shows what a GPU would refuse
    bf16, floats = (torch.zeros(8, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    step = torch.ones(())  # as a checkpoint may give it
    states.adamw_([bf16], [bf16.clone()], [step], [floats], [floats.clone()], group, stochastic_round=False)
