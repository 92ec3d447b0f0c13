"""Refuses sections of a config whose component cannot be imported, or cannot be made with the section's keys."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from gmt_tune.errors import UserError

# What torchtune's loggers import when they are made, by the logger's name.
_PACKAGES_OF_LOGGERS = {
    "WandBLogger": "wandb",
    "TensorBoardLogger": "tensorboard",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
}

# What is raised by a component that was given a value of a wrong kind or out of its range.
_OF_WRONG_VALUES = (TypeError, ValueError, IndexError, KeyError, AttributeError)


def check_component(name: str, cfg: DictConfig, positional: int, keywords: Sequence[str]) -> None:
    """Check that a section's component can be imported and takes the section's keys.

    Args:
        name: of the section, for messages.
        cfg: the section.
        positional: how many arguments the recipe gives by position.
        keywords: what else it gives, by name.

    Raises:
        UserError: if not.
    """
    if not OmegaConf.is_dict(cfg):
        raise UserError(f"{name} must be a section with _component_, got {cfg!r}")
    path = cfg.get("_component_", None)
    if not isinstance(path, str) or not path:
        raise UserError(f"{name}._component_ is missing: set it to a dotted path such as torch.optim.AdamW")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own module in the folder of the run, as torchtune allows
    try:
        component = _get_component_from_path(path)
    except (InstantiationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{name}._component_ '{path}' cannot be imported ({reason}): check its spelling") from None
    try:
        signature = inspect.signature(component)
    except ValueError:  # builtins tell nothing of their arguments
        return
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names = list(parameters)[positional:]
        for key in cfg:
            if key != "_component_" and key not in names:
                raise UserError(f"{name}.{key} ({cfg[key]!r}) is no key of {path}: {nearest(str(key), names)}")
    try:
        given = {key: None for key in cfg if key != "_component_"} | dict.fromkeys(keywords)
        given = {k: v for k, v in given.items() if k in parameters or k not in keywords}
        signature.bind(*[None] * positional, **given)
    except TypeError as error:
        raise UserError(f"{name} ({path}): {error}") from None


def import_function(key: str, path: object) -> None:
    """Raise UserError if a key's value is not the dotted path of something that can be imported."""
    if not isinstance(path, str):
        raise UserError(f"{key} must be a dotted path, got {path!r}")
    try:
        _get_component_from_path(path)
    except (InstantiationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{key} '{path}' cannot be imported ({reason}): check its spelling") from None


def try_optimizer(cfg_optimizer: DictConfig, cfg_lr_scheduler: DictConfig | None) -> None:
    """Make the optimizer and its schedule once, for a parameter of four entries, so that they check their values.

    Raises:
        UserError: with what they say.
    """
    lr = cfg_optimizer.get("lr", None)
    if lr is not None and not (is_number(lr) and lr >= 0):
        raise UserError(f"optimizer.lr must be a number from 0 on, such as 2e-5, got {lr!r}")
    try:
        optimizer = config.instantiate(cfg_optimizer, [nn.Parameter(torch.zeros(2, 2))])
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    except _OF_WRONG_VALUES as error:
        raise UserError(f"optimizer ({_written(cfg_optimizer)}) cannot be made: {one_line(error)}") from None
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"optimizer ({cfg_optimizer._component_}) needs a closure, which no recipe gives: take another")
    if cfg_lr_scheduler is None:
        return
    try:
        config.instantiate(cfg_lr_scheduler, optimizer, num_training_steps=10, last_epoch=-1)
    except _OF_WRONG_VALUES as error:
        raise UserError(f"lr_scheduler ({_written(cfg_lr_scheduler)}) cannot be made: {one_line(error)}") from None


def check_metric_logger(cfg_logger: DictConfig) -> None:
    """Raise UserError if the package of one of torchtune's loggers is not installed. Makes no logger: that writes."""
    name = cfg_logger._component_.rpartition(".")[2]
    package = _PACKAGES_OF_LOGGERS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"metric_logger._component_ {name} needs the package {package}: pip install {package}, or take "
            "torchtune.training.metric_logging.DiskLogger"
        )


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _written(section: DictConfig) -> str:
    """A section as its user wrote it."""
    values = [f"{key}: {value}" for key, value in OmegaConf.to_container(section).items() if key != "_component_"]
    return ", ".join([section._component_, *values])


def is_number(value: object) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def nearest(key: str, known: Iterable[str]) -> str:
    """What a wrong key may have meant, or else which keys there are."""
    known = sorted(known)
    match = get_close_matches(key, known, n=1)
    return f"did you mean {match[0]}?" if match else f"it takes {', '.join(known) or 'none'}"
