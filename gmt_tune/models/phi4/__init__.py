"""Phi-4 (Microsoft, 2024): 14B parameters.

In a config, load the weights with torchtune's ``FullModelHFCheckpointer`` and ``model_type: PHI4``.
"""

from gmt_tune.models.phi4.model_builders import phi4_14b
from gmt_tune.models.phi4.tokenizer import Phi4Tokenizer, phi4_tokenizer

__all__ = ["Phi4Tokenizer", "phi4_14b", "phi4_tokenizer"]
