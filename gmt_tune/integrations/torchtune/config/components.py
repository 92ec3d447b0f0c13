"""Refuses sections of a config whose component cannot be imported, or cannot be made with the section's keys."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
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

# Packages that torchtune's configs name, and does not bring.
_OPTIONAL_PACKAGES = ("bitsandbytes",)

# Packages whose modules do nothing but define things when they are imported.
_KNOWN_PACKAGES = ("torch", "torchao", "torchtune", "gmt_tune")


def check_component(
    name: str, cfg: DictConfig, positional: int = 0, names: Sequence[str] = (), *, only_known: bool = False
) -> None:
    """Check that a section's component can be imported and takes the section's keys.

    The recipe gives arguments too: ``positional`` many, and those in ``names``. With ``only_known``, no component of a
    package that we do not know is imported, and its section stays unchecked.
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
        known = list(parameters)[positional:]
        for key in cfg:
            if key != "_component_" and key not in known:
                raise UserError(f"{name}.{key} ({cfg[key]!r}) is no key of {path}: {did_you_mean(str(key), known)}")
    try:
        given = {key: None for key in cfg if key != "_component_"}
        given |= {key: None for key in names if key in parameters}
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
    """What a key's value, a dotted path, stands for; not called. UserError if it cannot be imported or called."""
    if not isinstance(path, str):
        raise UserError(f"{key} must be a dotted path, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own module in the folder of the run, as torchtune allows
    try:
        component = _get_component_from_path(path)
    except (Exception, SystemExit) as error:  # a module may raise anything when it is imported
        lacking = _lacking_package(error, path)
        if lacking is not None:
            instead = ", or take torchao.optim.AdamW8bit, which needs nothing more" if lacking == "bitsandbytes" else ""
            raise UserError(f"{key} '{path}' needs the package {lacking}: pip install {lacking}{instead}") from None
        reason = one_line(error.__cause__ or error)
        module, _, name = path.rpartition(".")
        known = dir(sys.modules[module]) if module in sys.modules else ()
        hint = did_you_mean(name, known, otherwise="check its spelling", prefix=f"{module}.")
        raise UserError(f"{key} '{path}' cannot be imported ({reason}): {hint}") from None
    if not callable(component):
        kind = type(component).__name__
        raise UserError(f"{key} '{path}' is a {kind}: name a class or a function in it")
    return component


def _lacking_package(error: BaseException, path: str) -> str | None:
    """The package that is not installed, where that is why a component cannot be imported; None for a wrong path."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ModuleNotFoundError):
        cause = cause.__cause__ or cause.__context__
    name = getattr(cause, "name", None) or ""
    package = name.partition(".")[0]
    is_of_path = path.partition(".")[0] == package and package not in _OPTIONAL_PACKAGES
    return None if not package or is_of_path or importlib.util.find_spec(package) is not None else package


def try_optimizer(cfg_optimizer: DictConfig, cfg_lr_scheduler: DictConfig | None) -> Any:
    """Make optimizer and schedule once, for four entries, so that they check their values; raises UserError.

    Returns:
        That optimizer.
    """
    optimizer = _make("optimizer", cfg_optimizer, [nn.Parameter(torch.zeros(2, 2))])
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"optimizer ({cfg_optimizer._component_}) needs a closure, which no recipe gives: take another")
    if cfg_lr_scheduler is not None:
        _make("lr_scheduler", cfg_lr_scheduler, optimizer, num_training_steps=10, last_epoch=-1)
    return optimizer


def _make(name: str, section: DictConfig, *args, **kwargs):
    try:
        return config.instantiate(section, *args, **kwargs)
    # Of a wrong kind, out of range, or for another device
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        values = [f"{key}: {value}" for key, value in OmegaConf.to_container(section).items() if key != "_component_"]
        written = ", ".join([section._component_, *values])
        raise UserError(f"{name} ({written}) cannot be made: {one_line(error)}") from None


def check_metric_logger(cfg_logger: DictConfig) -> None:
    """Raise UserError if the package of one of torchtune's loggers is not installed. Makes no logger: that writes."""
    name = cfg_logger._component_.rpartition(".")[2]
    package = _PACKAGES_OF_LOGGERS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"metric_logger._component_ {name} needs the package {package}: pip install {package}, or take "
            "torchtune.training.metric_logging.DiskLogger"
        )
