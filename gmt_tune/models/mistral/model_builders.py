"""Mistral 7B v0.3, by torchtune's component builder."""

from torchtune.models.mistral import mistral
from torchtune.modules import TransformerDecoder

MAX_SEQ_LEN = 32_768


def mistral_7b_v0_3(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Mistral 7B v0.3: 32 layers of width 4096; 7.25 billion parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return mistral(
        vocab_size=32_768,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        embed_dim=4096,
        intermediate_dim=14_336,
        max_seq_len=max_seq_len,
        norm_eps=1e-5,
        rope_base=1_000_000,
    )
