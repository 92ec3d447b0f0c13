"""The quickstart's model: a Llama small enough to pretrain and to fine-tune on a CPU in minutes."""

from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

__all__ = ["tiny_llama"]

# One place for the numbers: the script that pretrains it writes them into its config.json too.
VOCAB_SIZE = 832
NUM_LAYERS = 4
NUM_HEADS = 4
EMBED_DIM = 128
INTERMEDIATE_DIM = 512
ROPE_BASE = 10_000
NORM_EPS = 1e-5
MAX_SEQ_LEN = 256


def tiny_llama(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """A Llama 3.2 with 1.2 million parameters, four layers and tied embeddings.

    Its weights come with the package, in ``${gmt_asset:quickstart}``, as an ordinary Hugging Face folder; they have
    seen no more than 128 tokens at a time. Every head has its own keys and values, so that a model has only five
    shapes of parameters: torchao's optimizers compile their update once for each.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for.
    """
    return llama3_2(
        vocab_size=VOCAB_SIZE,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS,
        embed_dim=EMBED_DIM,
        intermediate_dim=INTERMEDIATE_DIM,
        max_seq_len=max_seq_len,
        rope_base=ROPE_BASE,
        norm_eps=NORM_EPS,
        scale_factor=1,  # plain rotary positions, no stretching for long contexts
    )
