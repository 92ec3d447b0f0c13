"""The dimensions of the Gemma 2 models, built of torchtune's parts.

torchtune 0.6.1 has builders of the same names, which exchange the two values of soft-capping and cap what enters the
output layer instead of the logits; and its ``model_type: GEMMA2`` exchanges the norms before and behind the MLP. So
they compute something else than the releases; the parts themselves, attention and embeddings, are right.

With a cache of keys and values, as torchtune's ``generate`` has it, its attention is right for sequences no longer than
the sliding window.

``max_seq_len`` is the number of positions that rotary embeddings are computed for; the models' limit is the default.
"""

from typing import Any

from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torchtune.models import gemma2 as torchtune_gemma2
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import TransformerDecoder

from gmt_tune.models.gemma2.soft_capping import SoftCappedLinear

MAX_SEQ_LEN = 8192


def gemma2_2b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Gemma 2 2B: 26 layers of width 2304; 2.61 billion parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _gemma2(26, 8, 4, 256, 2304, 9216, query_pre_attn_scalar=256, max_seq_len=max_seq_len)


def gemma2_9b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Gemma 2 9B: 42 layers of width 3584; 9.24 billion parameters.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _gemma2(42, 16, 8, 256, 3584, 14_336, query_pre_attn_scalar=256, max_seq_len=max_seq_len)


def gemma2_27b(max_seq_len: int = MAX_SEQ_LEN) -> TransformerDecoder:
    """Gemma 2 27B: 46 layers of width 4608, whose queries are not scaled by the size of a head; 27.2 billion.

    Args:
        max_seq_len: number of positions that rotary embeddings are computed for; default, the model's limit.
    """
    return _gemma2(46, 32, 16, 128, 4608, 36_864, query_pre_attn_scalar=144, max_seq_len=max_seq_len)


def _gemma2(
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    *,
    query_pre_attn_scalar: int,
    max_seq_len: int,
) -> TransformerDecoder:
    return gemma2(
        vocab_size=256_000,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        query_pre_attn_scalar=query_pre_attn_scalar,
    )


def gemma2(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    norm_eps: float = 1e-6,
    rope_base: int = 10_000,
    hidden_capping_value: float = 50.0,
    final_capping_value: float = 30.0,
    sliding_window_size: int = 4096,
    query_pre_attn_scalar: int | None = None,
) -> TransformerDecoder:
    """A Gemma 2 of any size; the arguments are those of torchtune's builder, with the same names of parameters except
    ``norm.scale``.

    Args:
        vocab_size, num_layers, num_heads, num_kv_heads, embed_dim, intermediate_dim: sizes, as in a config.json.
        max_seq_len: number of positions that rotary embeddings are computed for.
        head_dim: size of a head.
        norm_eps: added to the mean square before its root is taken.
        rope_base: of the rotary embeddings.
        hidden_capping_value: bound of the attention scores (``attn_logit_softcapping`` in a config.json).
        final_capping_value: bound of the logits (``final_logit_softcapping``).
        sliding_window_size: tokens that every other layer sees, from the first layer on.
        query_pre_attn_scalar: queries are divided by its root; default ``head_dim``.
    """
    model = torchtune_gemma2.gemma2(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        norm_eps=norm_eps,
        rope_base=rope_base,
        hidden_capping_value=hidden_capping_value,
        final_capping_value=final_capping_value,
        sliding_window_size=sliding_window_size,
        query_pre_attn_scalar=query_pre_attn_scalar,
    )
    model.norm = GemmaRMSNorm(embed_dim, eps=norm_eps)
    model.output.linear = SoftCappedLinear(final_capping_value)
    model.register_forward_pre_hook(_with_dense_mask, with_kwargs=True)
    return model


def _with_dense_mask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Packed rows come with block masks on a GPU, which torchtune's attention of Gemma 2 does not take: it holds scores
    of all pairs of tokens, and a dense mask is small beside them."""
    mask = kwargs.get("mask")
    if isinstance(mask, BlockMask):
        batch, _, queries, keys = mask.shape
        device = mask.kv_num_blocks.device
        dense = create_mask(mask.mask_mod, batch, None, queries, keys, device=str(device))
        kwargs = {**kwargs, "mask": dense.squeeze(1)}
    return args, kwargs
