"""Why Gemma 2 has builders and a weight mapping of our own: torchtune 0.6.1's compute something else."""

import pytest
import torch
from tiny_families import FAMILIES, LENGTH, some_tokens
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.models import gemma2 as torchtunes
from torchtune.training import FullModelHFCheckpointer

from gmt_tune.models import gemma2

GEMMA2 = FAMILIES["gemma2"]


@pytest.fixture(scope="module")
def theirs():
    return GEMMA2.hf()


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def largest_difference(model, theirs) -> float:
    tokens = some_tokens()
    with torch.no_grad():
        return float((model.eval()(tokens) - theirs(tokens).logits).abs().max())


@pytest.mark.parametrize("size", ["2b", "9b", "27b"])
def test_soft_capping_has_the_releases_values(size):
    with torch.device("meta"):
        ours, other = (getattr(package, f"gemma2_{size}")() for package in (gemma2, torchtunes))
    assert (ours.layers[0].attn.softcapping, ours.output.linear.softcap) == (50.0, 30.0)
    assert (other.layers[0].attn.softcapping, other.norm.capping_value) == (30.0, 50.0)  # the fault
    windows = [layer.attn.sliding_window_size for layer in ours.layers]
    assert windows == [4096, None] * (len(windows) // 2)
    assert ours.layers[0].attn.scaling == pytest.approx((144 if size == "27b" else 256) ** -0.5)


def test_torchtunes_norms_around_the_mlp_are_exchanged(theirs, folder, tmp_path):
    assert largest_difference(GEMMA2.load(folder, tmp_path / "out"), theirs) < 1e-4
    reader = FullModelHFCheckpointer(str(folder), ["model.safetensors"], "GEMMA2", str(tmp_path / "out"))
    weights = reader.load_checkpoint()["model"]
    weights["norm.scale"] = weights.pop("norm.rms_norm.scale")
    model = GEMMA2.build()
    model.load_state_dict(weights)
    assert largest_difference(model, theirs) > 1


def test_torchtunes_model_caps_what_enters_the_output_layer(theirs, folder, tmp_path):
    model = torchtunes.gemma2(**{k: v for k, v in GEMMA2.section().items() if k != "_component_"})
    weights = GEMMA2.reader(folder, tmp_path / "out").load_checkpoint()["model"]
    weights["norm.rms_norm.scale"] = weights.pop("norm.scale")
    model.load_state_dict(weights)
    assert largest_difference(model, theirs) > 1


@torch.no_grad()
def test_soft_capping_and_the_window_matter_in_the_comparison(theirs, folder, tmp_path):
    """Otherwise, equal logits would say nothing of them."""
    for changes in ({"final_capping_value": 1e4}, {"hidden_capping_value": 1e4}, {"sliding_window_size": 64}):
        assert largest_difference(GEMMA2.load(folder, tmp_path / "out", **changes), theirs) > 0.1


@torch.no_grad()
def test_block_masks_of_packed_rows_are_as_good_as_dense_ones():
    model, tokens = GEMMA2.build(), some_tokens()
    document = torch.arange(LENGTH).expand(2, LENGTH) // torch.tensor([[7], [10]])
    dense = (document.unsqueeze(1) == document.unsqueeze(2)).tril()

    def sees(b, h, q, k):
        return (document[b, q] == document[b, k]) & (k <= q)

    blocks = create_block_mask(sees, 2, None, LENGTH, LENGTH, device="cpu")
    packed = model(tokens, mask=blocks)
    assert torch.equal(packed, model(tokens, mask=dense))
    assert not torch.allclose(packed, model(tokens))
