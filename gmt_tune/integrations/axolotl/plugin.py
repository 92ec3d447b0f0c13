"""The plugin class that Axolotl loads: from the validated config to a callback of its trainer."""

from axolotl.integrations.base import BasePlugin

from gmt_tune.integrations.axolotl.args import GradientMaskSection
from gmt_tune.integrations.transformers import GradientMaskCallback


class GradientMaskPlugin(BasePlugin):
    """Masks the gradient right before each optimizer step of Axolotl's trainers."""

    def get_input_args(self) -> str:
        """Dotted path of the pydantic model that Axolotl merges into its config."""
        return "gmt_tune.integrations.axolotl.args.GradientMaskArgs"

    def add_callbacks_pre_trainer(self, cfg, model) -> list[GradientMaskCallback]:
        """The callback, in time for the trainer's constructor, where it checks patterns and freezes parameters."""
        # Axolotl leaves out of the validated config what is null, while defaults stay in: a key that is missing
        # here was null there.
        options = {name: cfg.gradient_mask.get(name) for name in GradientMaskSection.model_fields}
        return [GradientMaskCallback(**options)]

    def post_trainer_create(self, cfg, trainer) -> None:
        """Let the callback know the folder that a run resumes from."""
        if cfg.resume_from_checkpoint:
            trainer.args.resume_from_checkpoint = cfg.resume_from_checkpoint
