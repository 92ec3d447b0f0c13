"""The dimensions of the three SmolLM2 models, and their tokenizer's default system message.

``max_seq_len`` is the number of positions that rotary embeddings are computed for; the models' limit is the default.
The output layer is tied to the embeddings.
"""

from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

from gmt_tune.models.chatml import ChatMLTokenizer

# What the chat template of the Instruct models says when a conversation has no system message.
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MAX_SEQ_LEN = 8192


def smollm2_135m(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """SmolLM2-135M: 30 layers of width 576; 134.5 million parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _smollm2(30, 9, 3, 576, 1536, rope_base=100_000, max_seq_len=max_seq_len)


def smollm2_360m(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """SmolLM2-360M: 32 layers of width 960; 361.8 million parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _smollm2(32, 15, 5, 960, 2560, rope_base=100_000, max_seq_len=max_seq_len)


def smollm2_1_7b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """SmolLM2-1.7B: 24 layers of width 2048, every query head with its own key head; 1.71 billion parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _smollm2(24, 32, 32, 2048, 8192, rope_base=130_000, max_seq_len=max_seq_len)


def smollm2_tokenizer(
    path: str, max_seq_len: int | None = None, system_prompt: str | None = SYSTEM_PROMPT
) -> ChatMLTokenizer:
    """The tokenizer of the SmolLM2-Instruct models; its ids equal those of their Hugging Face chat template.

    Args:
        path (str): the model's ``tokenizer.json``.
        max_seq_len (int | None): conversations with more tokens are cut to this length; default None, no limit.
        system_prompt (str | None): the system message of conversations without one; default SmolLM2's own,
            None for none.
    """
    return ChatMLTokenizer(path, max_seq_len=max_seq_len, system_prompt=system_prompt)


def _smollm2(
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    *,
    rope_base: int,
    max_seq_len: int,
) -> TransformerDecoder:
    # torchtune's Llama 3.2 is a Llama with tied embeddings; a scale factor of 1 leaves its rotary
    # embeddings as Llama 2 and SmolLM2 have them.
    return llama3_2(
        vocab_size=49_152,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        rope_base=rope_base,
        norm_eps=1e-5,
        scale_factor=1,
    )
