"""Makes the GradientMask of a config's section."""

import inspect

from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config

from gmt_tune.errors import UserError, did_you_mean
from gmt_tune.integrations.torchtune.config.components import import_component
from gmt_tune.masking import GradientMask


def build_gradient_mask(cfg_mask: DictConfig | None, model: nn.Module) -> GradientMask | None:
    """The config's mask over a model's parameters; None for plain full fine-tuning. UserError names a wrong key."""
    if cfg_mask is None:
        return None
    if not OmegaConf.is_dict(cfg_mask):
        raise UserError(
            f"gradient_mask must be a section with _component_ and density, got {cfg_mask!r}; "
            "leave it out for plain full fine-tuning"
        )
    if "_component_" not in cfg_mask:
        raise UserError("gradient_mask._component_ is missing: set it to gmt_tune.GradientMask")
    component = import_component("gradient_mask._component_", cfg_mask["_component_"])
    known = [name for name in inspect.signature(component).parameters if name != "named_parameters"]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(component).parameters.values())
    for key in cfg_mask:
        if key != "_component_" and key not in known and not takes_any:
            hint = did_you_mean(key, known, prefix="gradient_mask.")
            raise UserError(f"gradient_mask.{key} ({cfg_mask[key]!r}) is no key of {component.__name__}: {hint}")
    if "density" in known and "density" not in cfg_mask:
        raise UserError("gradient_mask.density is missing: set the fraction of entries that stay, such as 0.2")
    try:
        return config.instantiate(cfg_mask, model.named_parameters())
    except (TypeError, ValueError) as error:
        raise UserError(f"gradient_mask: {error}") from error
