"""Axolotl: ``plugins: [gmt_tune.integrations.axolotl.GradientMaskPlugin]`` and a ``gradient_mask:`` section.

Axolotl trains with trainers derived from the Hugging Face Trainer, so this plugin only carries the section of the
config to the callback of ``gmt_tune.integrations.transformers``.
"""

from gmt_tune.integrations.axolotl.args import GradientMaskArgs, GradientMaskSection
from gmt_tune.integrations.axolotl.plugin import GradientMaskPlugin

__all__ = ["GradientMaskArgs", "GradientMaskPlugin", "GradientMaskSection"]
