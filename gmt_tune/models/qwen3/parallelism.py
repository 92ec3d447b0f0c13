"""How tensor parallelism cuts Qwen 3."""

from torch.distributed.tensor.parallel import SequenceParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torchtune.models.llama3 import base_llama_tp_plan


def qwen3_tp_plan() -> dict[str, ParallelStyle]:
    """torchtune's plan for Llama, and the norms of heads: each device has heads of its own, and all have one scale.

    Without the latter, a scale's gradient would be that of a device's own heads. Not for models with tied embeddings.
    """
    # Of [batch, sequence, heads, head_dim], the heads are cut
    of_heads = {
        f"layers.*.attn.{norm}": SequenceParallel(sequence_dim=2, use_local_output=True)
        for norm in ("q_norm", "k_norm")
    }
    return {**base_llama_tp_plan(), **of_heads}
