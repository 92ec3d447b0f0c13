"""Connects a GradientMask to a recipe: builds it from the config and hooks it to the optimizers."""

import inspect
from difflib import get_close_matches

from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torchtune import config

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config_components import import_component
from gmt_tune.masking import GradientMask
from gmt_tune.masking.tracker import SelectionTracker


def build_gradient_mask(cfg_mask: DictConfig | None, model: nn.Module) -> GradientMask | None:
    """Instantiate the config's ``gradient_mask`` section for a model.

    Args:
        cfg_mask: the section, or None for plain full fine-tuning.
        model: its named parameters, as the optimizer holds them.

    Raises:
        UserError: names the key, the value, and what would be right.
    """
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
            nearest = get_close_matches(key, known, n=1)
            hint = f"did you mean gradient_mask.{nearest[0]}?" if nearest else f"keys are {', '.join(known)}"
            raise UserError(f"gradient_mask.{key} ({cfg_mask[key]!r}) is no key of {component.__name__}: {hint}")
    if "density" in known and "density" not in cfg_mask:
        raise UserError("gradient_mask.density is missing: set the fraction of entries that stay, such as 0.2")
    try:
        return config.instantiate(cfg_mask, model.named_parameters())
    except (TypeError, ValueError) as error:
        raise UserError(f"gradient_mask: {error}") from error


def register_gradient_mask(mask: GradientMask | None, optimizers: list[Optimizer]) -> None:
    """Mask right before the step of each optimizer: one for all parameters, or one for each of them."""
    if mask is None:
        return
    for optimizer in optimizers:
        mask.register(optimizer)


def track_selection(
    mask: GradientMask | None, optimizers: list[Optimizer], every: int | None
) -> SelectionTracker | None:
    """Watch what the mask lets through, every so many optimizer steps; call it after the mask is registered.

    Returns:
        What knows overlap and coverage; None where there is no mask, or ``every`` is None.
    """
    if mask is None or every is None:
        return None
    tracker = SelectionTracker(mask, every)
    for optimizer in optimizers:
        tracker.register(optimizer)
    return tracker
