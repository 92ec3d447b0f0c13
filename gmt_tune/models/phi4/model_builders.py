"""Phi-4, as torchtune's Phi-3 in other sizes."""

from torchtune.models.phi3 import phi3
from torchtune.modules import TransformerDecoder

MAX_SEQ_LEN = 16_384


def phi4_14b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Phi-4: 40 layers of width 5120; 14.66 billion parameters.

    torchtune's builder of the same name computes its positions with a base of 10,000; the release has 250,000.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return phi3(
        vocab_size=100_352,
        num_layers=40,
        num_heads=40,
        num_kv_heads=10,
        embed_dim=5120,
        intermediate_dim=17_920,
        max_seq_len=max_seq_len,
        norm_eps=1e-5,
        rope_base=250_000,
    )
