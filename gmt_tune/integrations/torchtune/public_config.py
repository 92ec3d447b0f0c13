"""A config as it may be written into files that people share: no secrets, nothing out of the environment."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

from gmt_tune.reporting.redaction import hidden_values, scrub, without_secrets


def public_config(cfg: DictConfig) -> dict:
    """A config with its interpolations resolved, except ``${oc.env:...}``, and with ``***`` for secrets.

    A number or a truth value is written also where it comes from the environment.
    """
    resolved = OmegaConf.to_container(cfg, resolve=True)
    return without_secrets(_numbers_of(resolved, _named(cfg)))


def environment_checks(cfg: DictConfig) -> dict[str, str]:
    """Twelve bits of a checksum of each value that :func:`public_config` leaves to the environment, by its key.

    They are enough to see that a value is another one, and too few to find out which.
    """
    return dict(_checks(public_config(cfg), OmegaConf.to_container(cfg, resolve=True)))


def config_to_log(cfg: DictConfig) -> DictConfig:
    """:func:`public_config` for torchtune's own loggers, which resolve a config and save it in its ``output_dir``."""
    public = OmegaConf.create(_escaped(public_config(cfg)))
    public.output_dir = cfg.output_dir
    return public


def without_secrets_of(cfg: DictConfig, text: str) -> str:
    """A text, such as a traceback, without the values that :func:`public_config` leaves out."""
    values: set[str] = set()
    with contextlib.suppress(Exception):  # a config that cannot be resolved must not hide the error at hand
        values.update(hidden_values(OmegaConf.to_container(cfg, resolve=True)))
        _named(cfg, values)
    return scrub(text, values)


class PublicConfigLogger:
    """A metric logger that is given the config without its secrets; all else is the logger's own.

    Args:
        logger: one of torchtune's, or of that kind.
    """

    def __init__(self, logger) -> None:
        self._logger = logger

    def log_config(self, config: DictConfig) -> None:
        """Log a config."""
        self._logger.log_config(config_to_log(config))

    def __getattr__(self, name: str):
        return getattr(self._logger, name)


def _named(cfg: DictConfig, values: set[str] | None = None):
    """A config with its interpolations resolved, except ``${oc.env:...}``, of which ``values`` collects the values."""
    own = copy.deepcopy(cfg)
    OmegaConf.clear_cache(own)  # of what resolvers that keep their results made of the environment
    with _environment_by_name(values):
        return _container(own)


@contextlib.contextmanager
def _environment_by_name(values: set[str] | None = None) -> Iterator[None]:
    """Let ``${oc.env:NAME}`` resolve to itself where the variable is set; ``values`` collects what they hold."""

    def name_of(name: str, *default: Any):
        if name not in os.environ:
            return oc.env(name, *default)
        if values is not None and not os.path.exists(os.environ[name]):  # a path that is there is no secret
            values.add(os.environ[name])
        return f"${{oc.env:{name}}}"

    # omegaconf 2.4 renamed register_new_resolver and warns about the old name
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)
    register("oc.env", name_of, replace=True)
    try:
        yield
    finally:
        register("oc.env", oc.env, replace=True)


def _container(node: DictConfig | ListConfig):
    """As ``OmegaConf.to_container``, with the text of an interpolation that cannot be resolved."""
    plain: Any = OmegaConf.to_container(node, resolve=False)
    if not isinstance(plain, (dict, list)):
        return plain
    for key in plain if isinstance(plain, dict) else range(len(plain)):
        with contextlib.suppress(Exception):  # a resolver of the user's may raise anything
            value = node[key]
            plain[key] = _container(value) if OmegaConf.is_config(value) else value
    return plain


def _numbers_of(resolved, named):
    """``named``, with the numbers, truth values and nulls of ``resolved``, which has the same keys."""
    if isinstance(resolved, dict) and isinstance(named, dict):
        return {key: _numbers_of(resolved.get(key), value) for key, value in named.items()}
    if isinstance(resolved, list) and isinstance(named, list) and len(resolved) == len(named):
        return [_numbers_of(*pair) for pair in zip(resolved, named, strict=True)]
    return named if isinstance(resolved, (str, dict, list)) else resolved


def _checks(public, resolved, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(public, dict) and isinstance(resolved, dict):
        for name in public:
            yield from _checks(public[name], resolved.get(name), f"{key}.{name}" if key else name)
    elif isinstance(public, list) and isinstance(resolved, list):
        for i, pair in enumerate(zip(public, resolved, strict=True)):
            yield from _checks(*pair, f"{key}[{i}]")
    elif isinstance(public, str) and "${oc.env:" in public:
        yield key, hashlib.sha256(repr(resolved).encode()).hexdigest()[:3]


def _escaped(value):
    if isinstance(value, dict):
        return {key: _escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_escaped(part) for part in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
