"""Hugging Face Trainer and everything built on it (TRL, Axolotl): the mask as a ``TrainerCallback``."""

from gmt_tune.integrations.transformers.callback import GradientMaskCallback

__all__ = ["GradientMaskCallback"]
