"""What sets Qwen 3's attention apart from torchtune's."""

import torch
from tiny_families import FAMILIES, some_tokens
from torchtune.modules import MultiHeadAttention

QWEN3 = FAMILIES["qwen3"]


@torch.no_grad()
def test_norms_of_heads_stand_before_the_rotation(tmp_path, monkeypatch):
    """torchtune's own attention has them behind it, which is why there is a class of our own."""
    theirs, tokens = QWEN3.hf(), some_tokens()
    theirs.save_pretrained(tmp_path / "hf")
    ours = QWEN3.load(tmp_path / "hf", tmp_path / "out")
    assert torch.allclose(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    monkeypatch.setattr(type(ours.layers[0].attn), "forward", MultiHeadAttention.forward)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() > 1


def test_parameters_have_torchtunes_names():
    names = {name for name, _ in QWEN3.build().named_parameters() if name.startswith("layers.0.attn.")}
    parts = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "output_proj.weight", "q_norm.scale", "k_norm.scale"]
    assert names == {f"layers.0.attn.{part}" for part in parts}


@torch.no_grad()
def test_generation_with_a_cache_gives_the_logits_of_the_whole_sequence():
    model, tokens = QWEN3.build(), some_tokens(length=12)
    whole = model(tokens)
    model.setup_caches(batch_size=2, dtype=torch.float32, decoder_max_seq_len=12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 12, 12)
    positions = torch.arange(12).expand(2, 12)
    spans = [(0, 5), *((i, i + 1) for i in range(5, 12))]
    cached = [model(tokens[:, a:b], mask=mask[:, a:b], input_pos=positions[:, a:b]) for a, b in spans]
    torch.testing.assert_close(torch.cat(cached, dim=1), whole)
