"""Reads a config as ``tune run`` gets it: a YAML file, and what the command line changes of it."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config._utils import _has_component

from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune.config.check import mark_new
from gmt_tune.integrations.torchtune.config.public import leaves

# What YAML reads as something else than text at the beginning of a value: an alias, an anchor, a tag, ...
_INDICATORS = "*&!%@`|>?"

# Keys that take a list of texts.
_LISTS = ("dense", "frozen", "custom_sharded_layers", "checkpoint_files")

# Keys that hold paths, by their names.
PATH_KEY = re.compile(r"(.+_)?(dir|path|paths|file|files|folder|root|source)")

# How null is written: YAML's ways, and Python's.
_NULL = ("null", "Null", "NULL", "~", "None")


def read_file(path: str | Path) -> dict[str, Any]:
    """The keys and values of a config file, interpolations as they are written; UserError if it is no such file."""
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as YAML ({_where(error, path)})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): name the file of a config") from None
    if not OmegaConf.is_dict(loaded) or all(value is None for value in loaded.values()):  # a word is a key to it
        raise UserError(f"{path} is no config: it must be a YAML file of keys and values")
    return OmegaConf.to_container(loaded, resolve=False)


def apply_overrides(given: dict[str, Any], overrides: Sequence[str]) -> DictConfig:
    """A config with what the command line changes: ``key=value``, and ``~key`` to remove a key.

    As torchtune does it, and besides: ``~section`` and ``section=null`` leave a whole section out, a value may contain
    ``=``, text that YAML takes for something else is an error that shows the quoting, and ``None`` is null in the file
    too. Top-level keys that the file lacks are marked for the config check, which knows the recipe's own. ``given``,
    what the file says, is changed. Raises UserError for the first override that cannot be read.
    """
    changes = OmegaConf.create({})
    for override in overrides:
        key, equals, value = override.partition("=")
        if override.startswith("~") and isinstance(given.get(key[1:], ""), (dict, list, type(None))):
            OmegaConf.update(changes, key[1:], None)
        elif override.startswith("~"):
            _remove(given, key[1:])
        elif not equals or not key:
            raise UserError(f"{override} on the command line must be in the form of key=value")
        elif value in _NULL:
            OmegaConf.update(changes, key, None)
        else:
            # A name alone is that of the section's component
            full_key = f"{key}._component_" if _has_component(given.get(key, None)) else key
            # torchtune's file names count with leading zeros, which are no number
            _set(changes, full_key, f"!!str {value}" if "max_filename" in key else value, override)
    cfg = OmegaConf.merge(OmegaConf.create(given), changes)
    for key in [key for key, value in OmegaConf.to_container(cfg).items() if value == "None"]:
        cfg[key] = None
    mark_new(cfg, [str(key) for key in changes if key not in given])
    return cfg


def expand_home(cfg: DictConfig) -> None:
    """Replace ``~/`` and ``~user/`` by the home folder in the paths of a config, which are known by their keys' names.

    What a path begins with a reference to (``${models}/x``) is a path too. Interpolations stay as they are written, so
    that no value of an environment variable gets into the config.
    """
    plain = OmegaConf.to_container(cfg)
    texts = {key: leaf for key, leaf in leaves(plain).items() if isinstance(leaf.value, str)}
    waiting = [key for key in texts if any(map(PATH_KEY.fullmatch, re.split(r"[.\[\]]+", key)))]
    seen = set(waiting)
    for key in waiting:  # which grows by what paths begin with a reference to
        text = texts[key].value
        if re.match(r"~[\w.-]*/", text):
            texts[key].value = os.path.expanduser(text)
        target = _refers_to(key, text)
        for _ in texts:  # through sections that are references themselves
            alias = next((k for k in texts if target.startswith(f"{k}.") and _refers_to(k, texts[k].value)), None)
            if alias is None:
                break
            target = _refers_to(alias, texts[alias].value) + target.removeprefix(alias)
        if target:
            found = [k for k in texts if k == target or k.startswith((f"{target}.", f"{target}["))]
            waiting += [k for k in found if k not in seen]
            seen.update(found)
    cfg.update(plain)


def _refers_to(key: str, text: str) -> str:
    """The key to which the reference leads that a key's text begins with; empty if it begins with none."""
    reference = re.match(r"\$\{\s*(\.*)([^:{}\s]+)\s*\}", text)
    if reference is None:
        return ""
    section = "".join(f"{part}." for part in key.split(".")[: -len(reference[1])]) if reference[1] else ""
    return section + re.sub(r"\[([a-zA-Z_]\w*)\]", r".\1", reference[2])


def _remove(given: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    section = given
    try:
        for parent in parents:
            section = section[parent]
        del section[last]
    except (KeyError, TypeError):
        raise UserError(f"~{key} on the command line: the config has no key {key} that could be removed") from None
    if parents and not section:
        _remove(given, ".".join(parents))


def _set(changes: DictConfig, key: str, text: str, override: str) -> None:
    try:
        changes.merge_with_dotlist([f"{key}={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        key, _, value = override.partition("=")
        quoted = _quoted(value, key.rpartition(".")[2] in _LISTS)
        raise UserError(
            f"{override} on the command line cannot be read as YAML, in which text with special characters needs "
            f"quotes: write '{key}={quoted}'"
            if quoted is not None
            else f"{override} on the command line cannot be read as YAML ({_problem(error)}): check its brackets and "
            "quotes"
        ) from None


def _quoted(value: str, is_list: bool) -> str | None:
    """A value, or each item of a list, with quotes around it; None where it is not plain what is meant as text."""
    if re.search(r"[\"'{}]", value) or value.startswith("[") != value.endswith("]"):
        return None
    if not is_list and not value.startswith("["):
        return json.dumps(value)
    items = value[1:-1] if value.startswith("[") else value
    return json.dumps([item.strip() for item in items.split(",")])


def _problem(error: Exception) -> str:
    return getattr(error, "problem", None) or one_line(error).partition(" full_key:")[0]


def _where(error: Exception, path: str | Path) -> str:
    """What is wrong in a file, in which line, and the remedy where a value begins with a special character."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return _problem(error)
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    bare = re.search(rf"(?:^|[\[,:-])\s*([{re.escape(_INDICATORS)}][^\s,\]]*)", line)
    hint = f": write {json.dumps(bare[1])}, with the quotes" if bare else ""
    return f"line {mark.line + 1}, {_problem(error)}{hint}"
