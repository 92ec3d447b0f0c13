"""A config as it may be written into files that people share: no secrets, nothing out of the environment."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

from gmt_tune.reporting.redaction import HIDDEN, hidden_values, is_credential, scrub, without_secrets


def public_config(cfg: DictConfig) -> dict:
    """A config with its interpolations resolved, except ``${oc.env:...}``, and with ``***`` for secrets.

    A number or a truth value is written also where it comes from the environment.
    """
    named = _named(cfg)
    resolved = leaves(OmegaConf.to_container(cfg, resolve=True))
    for key, leaf in leaves(named).items():
        if key in resolved and not isinstance(resolved[key].value, str):
            leaf.value = resolved[key].value
    return without_secrets(named)


def environment_checks(cfg: DictConfig) -> dict[str, str]:
    """:func:`check_of` each value that :func:`public_config` leaves to the environment or hides, by its key.

    Credentials are left out: a run may go on with new ones.
    """
    resolved = leaves(OmegaConf.to_container(cfg, resolve=True))
    return {key: check_of(resolved[key]) for key, leaf in leaves(public_config(cfg)).items() if _is_left_out(key, leaf)}


def check_of(leaf: Leaf) -> str:
    """Twelve bits of a checksum: enough to see that a value is another one, and too few to find out which."""
    return hashlib.sha256(repr(leaf.value).encode()).hexdigest()[:3]


@dataclass
class Leaf:
    """A value of a config that is no section and no list, in the section or list that holds it."""

    holder: Any
    name: Any

    @property
    def value(self):
        return self.holder[self.name]

    @value.setter
    def value(self, value) -> None:
        self.holder[self.name] = value


def leaves(config, prefix: str = "") -> dict[str, Leaf]:
    """Every leaf of plain dicts and lists, by a key such as ``dataset.data_files[0]``."""
    found: dict[str, Leaf] = {}
    is_list = isinstance(config, list)
    for name in range(len(config)) if is_list else config:
        key = f"{prefix}[{name}]" if is_list else f"{prefix}.{name}" if prefix else str(name)
        if isinstance(config[name], (dict, list)):
            found |= leaves(config[name], key)
        else:
            found[key] = Leaf(config, name)
    return found


def config_to_log(cfg: DictConfig) -> DictConfig:
    """:func:`public_config` for torchtune's own loggers, which resolve a config and save it in its ``output_dir``."""
    public = public_config(cfg)
    for leaf in leaves(public).values():
        if isinstance(leaf.value, str):
            leaf.value = leaf.value.replace("${", "\\${")
    return OmegaConf.create({**public, "output_dir": cfg.output_dir})


def without_secrets_of(cfg: DictConfig, text: str) -> str:
    """A text, such as a traceback, without the values that :func:`public_config` leaves out."""
    values: set[str] = set()
    with contextlib.suppress(Exception):  # a config that cannot be resolved must not hide the error at hand
        values.update(hidden_values(OmegaConf.to_container(cfg, resolve=True)))
        _named(cfg, values)
    return scrub(text, values)


class PublicConfigLogger:
    """A metric logger, as torchtune's are, that is given the config without its secrets."""

    def __init__(self, logger) -> None:
        self._logger = logger

    def log_config(self, config: DictConfig) -> None:
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


def _is_left_out(key: str, leaf: Leaf) -> bool:
    if not isinstance(leaf.value, str):
        return False
    name = re.sub(r"\[\d+\]", "", key).rpartition(".")[2]
    return "${oc.env:" in leaf.value or leaf.value == HIDDEN and not is_credential(name)
