"""Qwen 3 (Alibaba, 2025): the dense models of 0.6B to 32B parameters, which torchtune lacks.

In a config, load their weights with ``gmt_tune.models.FullModelHFCheckpointer`` and ``model_type:
gmt_tune.models.qwen3``.
"""

from gmt_tune.models.qwen3.model_builders import (
    qwen3,
    qwen3_0_6b,
    qwen3_1_7b,
    qwen3_4b,
    qwen3_8b,
    qwen3_14b,
    qwen3_32b,
)
from gmt_tune.models.qwen3.parallelism import qwen3_tp_plan
from gmt_tune.models.qwen3.tokenizer import Qwen3Tokenizer, qwen3_tokenizer
from gmt_tune.models.qwen3.weights import hf_to_tune, tune_to_hf

__all__ = [
    "Qwen3Tokenizer",
    "hf_to_tune",
    "qwen3",
    "qwen3_0_6b",
    "qwen3_14b",
    "qwen3_1_7b",
    "qwen3_32b",
    "qwen3_4b",
    "qwen3_8b",
    "qwen3_tp_plan",
    "qwen3_tokenizer",
    "tune_to_hf",
]
