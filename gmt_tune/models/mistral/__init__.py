"""Mistral 7B v0.3 (Mistral AI, 2024), which has another vocabulary and other positions than the v0.1 of torchtune.

In a config, load the weights with torchtune's ``FullModelHFCheckpointer`` and ``model_type: MISTRAL``.
"""

from gmt_tune.models.mistral.model_builders import mistral_7b_v0_3
from gmt_tune.models.mistral.tokenizer import MistralV03Tokenizer, mistral_v0_3_tokenizer

__all__ = ["MistralV03Tokenizer", "mistral_7b_v0_3", "mistral_v0_3_tokenizer"]
