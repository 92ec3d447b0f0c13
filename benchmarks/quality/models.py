"""Builders for the experiments: models with LoRA as torchtune builds them, faster products and losses on CPUs."""

from typing import Any

import torch
from torch import Tensor
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules import TransformerDecoder

from gmt_tune.models import tiny
from gmt_tune.models.losses import LinearCrossEntropyLoss
from gmt_tune.models.smollm2 import smollm2_135m as _smollm2_135m


def smollm2_135m(max_seq_len: int = 8192, float32_matmul_precision: str = "highest") -> TransformerDecoder:
    """
    SmolLM2-135M, and for this process the precision of products of fp32 matrices.

    Args:
        max_seq_len (int): positions that rotary embeddings are computed for.
        float32_matmul_precision (str): of ``torch.set_float32_matmul_precision``. "medium" multiplies in bf16 and adds
            up in fp32 where the CPU has such instructions; weights, gradients and optimizer stay fp32.

    Returns:
        TransformerDecoder: the model.
    """
    torch.set_float32_matmul_precision(float32_matmul_precision)
    return _smollm2_135m(max_seq_len=max_seq_len)


def lora_smollm2_135m(
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    *,
    lora_rank: int,
    lora_alpha: float,
    max_seq_len: int = 8192,
    float32_matmul_precision: str = "highest",
) -> TransformerDecoder:
    """SmolLM2-135M with LoRA, as ``torchtune.models.llama3_2.lora_llama3_2`` builds it; see there for the arguments."""
    torch.set_float32_matmul_precision(float32_matmul_precision)
    model = lora_llama3_2(
        list(lora_attn_modules),
        apply_lora_to_mlp,
        vocab_size=49_152,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        embed_dim=576,
        intermediate_dim=1536,
        max_seq_len=max_seq_len,
        rope_base=100_000,
        norm_eps=1e-5,
        scale_factor=1,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
    )
    model.register_state_dict_post_hook(_copy_weights)
    return model


def lora_tiny_llama(lora_attn_modules: list[str], apply_lora_to_mlp: bool = False, **options) -> TransformerDecoder:
    """The quickstart's model with LoRA; ``options`` are those of ``gmt_tune.models.tiny.lora_tiny_llama``."""
    model = tiny.lora_tiny_llama(list(lora_attn_modules), apply_lora_to_mlp, **options)
    model.register_state_dict_post_hook(_copy_weights)
    return model


class AnswerLoss(LinearCrossEntropyLoss):
    """The same loss from the logits of the positions that count alone: a fifth of SmolLM2's work on short answers.

    Not for a GPU, which would wait for the host to count them.
    """

    def _loss(self, hidden: Tensor, weight: Any, softcap: float | None) -> Tensor:
        assert self._labels is not None
        given, counted = self._labels, self._labels != self.ignore_index
        self._labels = given[counted]
        try:
            return super()._loss(hidden[counted], weight, softcap)
        finally:
            self._labels = given


def _copy_weights(module, state_dict, prefix, local_metadata) -> None:
    """Let ``state_dict()`` give copies.

    At the end of each epoch torchtune 0.6.1's LoRA recipe adds the adapters to what ``state_dict()`` gave it, in place.
    On a GPU that is a copy on the host; on the CPU it is the model itself, which would train on with its adapters
    added once more.
    """
    for name, tensor in state_dict.items():
        if isinstance(tensor, torch.Tensor):
            state_dict[name] = tensor.clone()
