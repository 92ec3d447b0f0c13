"""Attention with norms of queries and keys, as Qwen 3 has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchtune.modules import MultiHeadAttention


class Qwen3Attention(MultiHeadAttention):
    """torchtune's attention, with ``q_norm`` and ``k_norm`` before the rotary positions instead of after them.

    The two orders differ: a norm's scale has a value for each entry of a head, and the rotation mixes entries.
    Arguments and masks are those of torchtune's class; every head has ``head_dim`` entries, whatever ``embed_dim`` is.
    For tensor parallelism, the norms see [batch, sequence, heads, head_dim], of which the heads are cut.
    """

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Any = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """Attention of ``x`` to ``y``, which is ``x`` itself in a decoder.

        Args:
            x: [batch, sequence, embed_dim], the queries.
            y: [batch, sequence, embed_dim], the keys and values.
            mask: True where a query sees a key, [batch, sequence, keys], or a ``BlockMask``; default causal.
            input_pos: the position of each token, [batch, sequence]; default, its index.

        Returns:
            [batch, sequence, embed_dim].

        Raises:
            ValueError: without ``y``, which torchtune's class reads from a cache instead.
        """
        if y is None:
            raise ValueError("Qwen3Attention needs the keys' and values' input y")

        def heads(projected: Tensor, norm: Any) -> Tensor:
            split = norm(projected.unflatten(-1, (-1, self.head_dim)))
            return self.pos_embeddings(split, input_pos=input_pos).transpose(1, 2)

        # [batch, heads, sequence, head_dim] from here on
        q, k = heads(self.q_proj(x), self.q_norm), heads(self.k_proj(y), self.k_norm)
        v = self.v_proj(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        queries_of_a_key = self.num_heads // self.num_kv_heads
        if queries_of_a_key > 1:
            k, v = (t.repeat_interleave(queries_of_a_key, dim=1) for t in (k, v))
        attended = self._attention_call(
            q,
            k,
            v,
            mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=self.is_causal and mask is None and self.kv_cache is None,
        )
        return self.output_proj(attended.transpose(1, 2).flatten(2))
