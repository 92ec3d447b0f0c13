"""Qwen 2.5 (Alibaba, 2024): models of 0.5B to 32B parameters; torchtune has their builders.

In a config, load the weights with torchtune's ``FullModelHFCheckpointer`` and ``model_type: QWEN2``.
"""

from gmt_tune.models.qwen2_5.tokenizer import Qwen2_5Tokenizer, qwen2_5_tokenizer

__all__ = ["Qwen2_5Tokenizer", "qwen2_5_tokenizer"]
