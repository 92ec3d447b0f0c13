"""A selection kept at 1 bit per entry selects the same entries again."""

import full_sort
import pytest
import torch

from gmt_tune.masking import packing
from gmt_tune.masking.packing import apply_packed_, pack_selection, unpack_selection
from gmt_tune.masking.selection import ThresholdSelection


@pytest.fixture(params=[None, 64], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    if request.param:
        monkeypatch.setitem(packing._BLOCK, "cpu", request.param)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (13, 50), (1000,), (5, 3, 11), ()])
def test_packing_keeps_every_bit_in_order(shape, block):
    selected = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_selection(selected)
    assert packed.dtype == torch.uint8 and packed.shape == ((selected.numel() + 7) // 8,)
    assert torch.equal(unpack_selection(packed, selected.numel()), selected.view(-1))
    for i, bit in enumerate(selected.view(-1).tolist()):
        assert bool(packed[i // 8] & (1 << i % 8)) == bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_selection_masks_any_layout(dtype, block):
    grad = torch.randn(30, 51, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    selected = torch.rand(30, 51, generator=torch.Generator().manual_seed(1)) < 0.3
    wanted = torch.where(selected, grad, torch.zeros_like(grad))
    for copy in (grad.clone(), grad.t().contiguous().t(), torch.stack([grad, grad], 2)[..., 0]):
        count = apply_packed_(copy, pack_selection(selected))
        assert full_sort.same_bits(copy, wanted)
        assert count.dtype == torch.int64 and int(count) == int(selected.sum())


def test_packing_by_threshold_equals_packing_the_selection(block):
    for score in (torch.randn(30, 51), torch.randn(51, 30).bfloat16().t()):
        selection = ThresholdSelection(score, score.abs().median())
        assert torch.equal(selection.pack().bits, pack_selection(selection.mask()))
        assert torch.equal(selection.pack().mask(), selection.mask())


def test_selected_values_come_back_to_their_places():
    grad = torch.randn(30, 51, generator=torch.Generator().manual_seed(0))
    selection = ThresholdSelection(grad, grad.abs().median())
    values = selection.compact(grad)
    assert torch.equal(values, grad[selection.mask()]) and len(values) == 766
    assert torch.equal(selection.pack().expand(values), torch.where(selection.mask(), grad, 0))
