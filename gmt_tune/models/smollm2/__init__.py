"""SmolLM2 (Hugging Face, 2024): Llama models of 135M, 360M and 1.7B parameters that speak ChatML.

In a config, load their weights with torchtune's ``FullModelHFCheckpointer`` and ``model_type: LLAMA3_2``.
"""

from gmt_tune.models.smollm2.model_builders import smollm2_1_7b, smollm2_135m, smollm2_360m, smollm2_tokenizer

__all__ = ["smollm2_135m", "smollm2_1_7b", "smollm2_360m", "smollm2_tokenizer"]
