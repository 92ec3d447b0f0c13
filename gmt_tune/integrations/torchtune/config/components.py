"""Refuses sections of a config whose component cannot be imported, or cannot be made with the section's keys."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config
from torchtune.config._utils import _get_component_from_path

from gmt_tune.errors import UserError, did_you_mean, one_line

# What torchtune's loggers import when they are made, by the logger's name.
_PACKAGES_OF_LOGGERS = {
    "WandBLogger": "wandb",
    "TensorBoardLogger": "tensorboard",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
}

# Packages whose modules do nothing but define things when they are imported.
_KNOWN_PACKAGES = ("torch", "torchao", "torchtune", "gmt_tune")

# What is raised by a component that was given a value of a wrong kind or out of its range.
_OF_WRONG_VALUES = (TypeError, ValueError, IndexError, KeyError, AttributeError)


def check_component(
    name: str, cfg: DictConfig, positional: int, keywords: Sequence[str], *, only_known: bool = False
) -> None:
    """Check that a section's component can be imported and takes the section's keys.

    Args:
        name: of the section, for messages.
        cfg: the section.
        positional: how many arguments the recipe gives by position.
        keywords: what else it gives, by name.
        only_known: leave components of other packages than torch, torchao, torchtune and gmt_tune alone, which are
            imported otherwise.

    Raises:
        UserError: if not.
    """
    path = component_path(name, cfg)
    if only_known and not is_known_package(path):
        return
    component = import_component(f"{name}._component_", path)
    try:
        signature = inspect.signature(component)
    except (TypeError, ValueError):  # it is no function, or a builtin, which says nothing of its arguments
        return
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        names = list(parameters)[positional:]
        for key in cfg:
            if key != "_component_" and key not in names:
                raise UserError(f"{name}.{key} ({cfg[key]!r}) is no key of {path}: {did_you_mean(str(key), names)}")
    try:
        given = {key: None for key in cfg if key != "_component_"} | dict.fromkeys(keywords)
        given = {k: v for k, v in given.items() if k in parameters or k not in keywords}
        signature.bind(*[None] * positional, **given)
    except TypeError as error:
        raise UserError(f"{name} ({path}): {error}") from None


def component_path(name: str, cfg: Any) -> str:
    """The ``_component_`` of a section; raises UserError if it is no section, or has none."""
    if not OmegaConf.is_dict(cfg):
        raise UserError(f"{name} must be a section with _component_, got {cfg!r}")
    path = cfg.get("_component_", None)
    if path is None or path == "":
        raise UserError(f"{name}._component_ is missing: set it to a dotted path such as torch.optim.AdamW")
    if not isinstance(path, str):
        raise UserError(f"{name}._component_ must be a dotted path, got {path!r}")
    return path


def is_known_package(path: str) -> bool:
    """Whether a dotted path is of a package that can be imported without running code of a config's author."""
    return path.split(".")[0] in _KNOWN_PACKAGES


def import_component(key: str, path: object) -> Any:
    """What a key's value, a dotted path, stands for; it is not called.

    Raises:
        UserError: if the value is no dotted path, or what it names cannot be imported.
    """
    if not isinstance(path, str):
        raise UserError(f"{key} must be a dotted path, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own module in the folder of the run, as torchtune allows
    try:
        return _get_component_from_path(path)
    except (Exception, SystemExit) as error:  # a module may raise anything when it is imported
        reason = one_line(error.__cause__ or error)
        raise UserError(f"{key} '{path}' cannot be imported ({reason}): check its spelling") from None


def try_optimizer(cfg_optimizer: DictConfig, cfg_lr_scheduler: DictConfig | None) -> None:
    """Make the optimizer and its schedule once, for a parameter of four entries, so that they check their values.

    Raises:
        UserError: with what they say.
    """
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


def _written(section: DictConfig) -> str:
    """A section as its user wrote it."""
    values = [f"{key}: {value}" for key, value in OmegaConf.to_container(section).items() if key != "_component_"]
    return ", ".join([section._component_, *values])


def meant(key: str, known: Sequence[str]) -> str | None:
    """The known key that another has words of in its order, cut short or not, or is like; None if it is like none."""
    words = key.lower().split("_")
    in_part = [name for name in known if len(words) > 1 and _in_order(words, name.split("_"))]
    return next(iter(in_part + get_close_matches(key.lower(), known, n=1, cutoff=0.7)), None)


def _in_order(words: Sequence[str], others: Sequence[str]) -> bool:
    rest = iter(others)
    return all(any(other.startswith(word) for other in rest) for word in words)
