"""Gemma 2 (Google, 2024): models of 2B, 9B and 27B parameters.

torchtune 0.6.1 has builders and a ``model_type`` for them, which compute something else than the releases do: see
``model_builders``. In a config, load the weights with ``gmt_tune.models.FullModelHFCheckpointer`` and ``model_type:
gmt_tune.models.gemma2``.
"""

from gmt_tune.models.gemma2.model_builders import gemma2, gemma2_2b, gemma2_9b, gemma2_27b
from gmt_tune.models.gemma2.tokenizer import Gemma2Tokenizer, gemma2_tokenizer
from gmt_tune.models.gemma2.weights import hf_to_tune, tune_to_hf

__all__ = [
    "Gemma2Tokenizer",
    "gemma2",
    "gemma2_27b",
    "gemma2_2b",
    "gemma2_9b",
    "gemma2_tokenizer",
    "hf_to_tune",
    "tune_to_hf",
]
