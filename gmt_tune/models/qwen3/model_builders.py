"""The dimensions of the dense Qwen 3 models.

``max_seq_len`` is the number of positions that rotary embeddings are computed for; the models' limit is the default.
"""

from torch import nn
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import FeedForward, RMSNorm, TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

from gmt_tune.models.qwen3.attention import Qwen3Attention

MAX_SEQ_LEN = 40_960


def qwen3_0_6b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Qwen3-0.6B: 28 layers of width 1024, tied embeddings; 596 million parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _qwen3(28, 16, 1024, 3072, tie_word_embeddings=True, max_seq_len=max_seq_len)


def qwen3_1_7b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Qwen3-1.7B: 28 layers of width 2048, tied embeddings; 1.72 billion parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _qwen3(28, 16, 2048, 6144, tie_word_embeddings=True, max_seq_len=max_seq_len)


def qwen3_4b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Qwen3-4B: 36 layers of width 2560, tied embeddings; 4.02 billion parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _qwen3(36, 32, 2560, 9728, tie_word_embeddings=True, max_seq_len=max_seq_len)


def qwen3_8b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Qwen3-8B: 36 layers of width 4096; 8.19 billion parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _qwen3(36, 32, 4096, 12_288, tie_word_embeddings=False, max_seq_len=max_seq_len)


def qwen3_14b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Qwen3-14B: 40 layers of width 5120; 14.77 billion parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _qwen3(40, 40, 5120, 17_408, tie_word_embeddings=False, max_seq_len=max_seq_len)


def qwen3_32b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Qwen3-32B: 64 layers of width 5120; 32.76 billion parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _qwen3(64, 64, 5120, 25_600, tie_word_embeddings=False, max_seq_len=max_seq_len)


def _qwen3(
    num_layers: int,
    num_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    *,
    tie_word_embeddings: bool,
    max_seq_len: int,
) -> TransformerDecoder:
    return qwen3(
        vocab_size=151_936,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        tie_word_embeddings=tie_word_embeddings,
    )


def qwen3(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
    tie_word_embeddings: bool = False,
) -> TransformerDecoder:
    """A dense Qwen 3 of any size; the arguments are those of torchtune's builders.

    Args:
        vocab_size, num_layers, num_heads, num_kv_heads, embed_dim, intermediate_dim: sizes, as in a config.json.
        max_seq_len: number of positions that rotary embeddings are computed for.
        attn_dropout: share of the attention's weights that are dropped in training.
        norm_eps: added to the mean square before its root is taken.
        rope_base: of the rotary embeddings.
        head_dim: size of a head, which need not be ``embed_dim / num_heads``.
        tie_word_embeddings: whether the output layer uses the embeddings.
    """
    rope = Qwen2RotaryPositionalEmbeddings(dim=head_dim, max_seq_len=max_seq_len, base=rope_base)

    def linear(in_dim: int, out_dim: int) -> nn.Linear:
        return nn.Linear(in_dim, out_dim, bias=False)

    layers = nn.ModuleList()
    for _ in range(num_layers):
        attention = Qwen3Attention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=linear(embed_dim, num_heads * head_dim),
            k_proj=linear(embed_dim, num_kv_heads * head_dim),
            v_proj=linear(embed_dim, num_kv_heads * head_dim),
            output_proj=linear(num_heads * head_dim, embed_dim),
            pos_embeddings=rope,
            q_norm=RMSNorm(head_dim, eps=norm_eps),
            k_norm=RMSNorm(head_dim, eps=norm_eps),
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
        )
        mlp = FeedForward(
            gate_proj=linear(embed_dim, intermediate_dim),
            up_proj=linear(embed_dim, intermediate_dim),
            down_proj=linear(intermediate_dim, embed_dim),
        )
        norms = {name: RMSNorm(embed_dim, eps=norm_eps) for name in ("sa_norm", "mlp_norm")}
        layers.append(TransformerSelfAttentionLayer(attention, mlp, **norms))
    embeddings = nn.Embedding(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(embeddings) if tie_word_embeddings else linear(embed_dim, vocab_size),
    )
