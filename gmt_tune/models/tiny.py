"""The quickstart's model: a Llama small enough to pretrain and to fine-tune on a CPU in minutes."""

from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TransformerDecoder

__all__ = ["lora_tiny_llama", "tiny_llama"]

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


def lora_tiny_llama(
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    *,
    lora_rank: int,
    lora_alpha: float,
    max_seq_len: int = MAX_SEQ_LEN,
) -> TransformerDecoder:
    """The same model with LoRA, as ``torchtune.models.llama3_2.lora_llama3_2`` builds it.

    Args:
        lora_attn_modules: which of "q_proj", "k_proj", "v_proj" and "output_proj" get adapters.
        apply_lora_to_mlp: whether the matrices of the MLP get them, too.
        lora_rank: of each adapter.
        lora_alpha: what an adapter's product is scaled by, times the rank.
        max_seq_len: number of positions that rotary embeddings are computed for.
    """
    return lora_llama3_2(
        lora_attn_modules,
        apply_lora_to_mlp,
        vocab_size=VOCAB_SIZE,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS,
        embed_dim=EMBED_DIM,
        intermediate_dim=INTERMEDIATE_DIM,
        max_seq_len=max_seq_len,
        rope_base=ROPE_BASE,
        norm_eps=NORM_EPS,
        scale_factor=1,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
    )
