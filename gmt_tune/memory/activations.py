"""What forward and backward need besides the states: an estimate for torchtune's TransformerDecoder.

Notation: T tokens in a micro-batch (B x S), d embedding width, A = heads x head width, I the feed-forward's
inner width, V vocabulary, L layers, e bytes of an entry. Derived from what autograd saves in
torchtune/modules/transformer.py, attention.py, feed_forward.py, rms_norm.py and
loss/ce_chunked_output_loss.py, run without compilation (which needs less); the tests compare it with the
tensors that autograd really saves, and the whole with torch's own MemTracker.
"""

from dataclasses import dataclass
from typing import Any

OFFLOAD_STASH = 5  # saved tensors that torchtune's OffloadActivations keeps on the device


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder and of one micro-batch that its memory depends on. Bytes of an entry: ``itemsize``."""

    batch_size: int
    seq_len: int
    embed_dim: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    num_layers: int
    itemsize: int

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len


def shape_of(model: Any, batch_size: int, seq_len: int, itemsize: int) -> Shape | None:
    """The sizes of a torchtune ``TransformerDecoder``, or None for a model of another make."""
    try:
        layer = model.layers[0]
        return Shape(
            batch_size=batch_size,
            seq_len=seq_len,
            embed_dim=model.tok_embeddings.embedding_dim,
            num_heads=layer.attn.num_heads,
            head_dim=layer.attn.head_dim,
            hidden_dim=layer.mlp.w1.weight.shape[0],
            vocab_size=model.tok_embeddings.num_embeddings,
            num_layers=len(model.layers),
            itemsize=itemsize,
        )
    except (AttributeError, TypeError, IndexError):
        return None


def layer_bytes(s: Shape, tensor_parallel: int = 1) -> int:
    """Bytes that autograd saves in one layer without checkpointing.

    Per token: each of the two norms keeps its input and the normalised input in fp32, one fp32 scale, and its output
    (16 d + 8 + 2 d e); attention keeps q, k, v (k and v expanded to all heads), its output (4 A e) and a
    log-sum-exp a head (4 A / head width); the feed-forward keeps four tensors of its inner width (4 I e).
    """
    attention = s.num_heads * s.head_dim
    norms = 16 * s.embed_dim + 8 + 2 * s.embed_dim * s.itemsize
    inner = 4 * attention * s.itemsize + 4 * s.num_heads + 4 * s.hidden_dim * s.itemsize
    return s.tokens * (norms + inner // tensor_parallel)


def layer_input_bytes(s: Shape) -> int:
    """Bytes of one layer's input, all that activation checkpointing keeps of a layer: T d e."""
    return s.tokens * s.embed_dim * s.itemsize


def layer_scratch_bytes(s: Shape, tensor_parallel: int = 1) -> int:
    """Bytes of the gradients of activations that one layer's backward holds at once: 3 T I e."""
    return 3 * s.tokens * s.hidden_dim * s.itemsize // tensor_parallel


def head_bytes(s: Shape, output_chunks: int, *, pairs: bool = False) -> int:
    """Bytes of the final norm, the logits and the loss when the loss has been computed.

    Per token: final norm 8 d + d e. With chunks, the logits (V e) and all fp32 log-probabilities (4 V), besides the
    fp32 logits of one chunk (4 V / chunks). Without (0), the fp32 log-probabilities, their gradient and that of the
    logits, at the beginning of backward (12 V). With pairs, while the reference model runs: the log-probabilities of
    the other model (4 V), its own logits (4 V), and of one half of them a copy and the log-probabilities (2 V each).
    """
    norm = s.embed_dim * (8 + s.itemsize)
    if pairs:
        logits = 12 * s.vocab_size
    elif output_chunks:
        logits = s.vocab_size * s.itemsize + 4 * s.vocab_size + 4 * s.vocab_size / output_chunks
    else:
        logits = 12 * s.vocab_size
    return int(s.tokens * (norm + logits))


def head_backward_bytes(s: Shape, output_chunks: int, weight: int) -> int:
    """Bytes of the head in the backward pass of a chunked loss, besides what is kept of the layers.

    First that of the losses: the fp32 log-probabilities of all chunks (4 V) and, of one chunk, two gradients of them
    (8 V / chunks). Then that of the output layer: the gradients of all logits (V e) but those of one chunk, and three
    gradients of the weight: autograd makes the first sum of two chunks' a new tensor.

    Args:
        weight: entries of the output layer's weight, if it is trained.
    """
    of_losses = s.tokens * s.vocab_size * (4 + 8 / output_chunks)
    logits = s.tokens * s.vocab_size * s.itemsize
    return int(max(of_losses, logits * (1 - 1 / output_chunks) + (3 if output_chunks > 1 else 1) * weight * s.itemsize))


def linear_head_bytes(s: Shape, chunks: int, weight: int) -> int:
    """Bytes of the head with ``gmt_tune.models.losses.LinearCrossEntropyLoss``, which computes gradients in forward.

    Those of the hidden states (T d e) and of the weight; of one chunk the logits and log-probabilities in fp32 (8 V),
    beside the log-probabilities and gradients that the chunk before has left (4 V + V e); and of the final norm what
    autograd keeps (d (4 + e)).

    Args:
        weight: entries of the output layer's weight, if it is trained.
    """
    norm = s.embed_dim * (4 + s.itemsize)
    logits = s.vocab_size * (12 + s.itemsize) / chunks
    return int(s.tokens * (norm + s.embed_dim * s.itemsize + logits)) + weight * s.itemsize
