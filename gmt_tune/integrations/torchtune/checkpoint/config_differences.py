"""Whether a run's config is that of the run that saved a checkpoint, in all that changes the training."""

from __future__ import annotations

import json
from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from gmt_tune.integrations.torchtune.config.keys import may_differ
from gmt_tune.integrations.torchtune.config.public import check_of, leaves, public_config
from gmt_tune.reporting.redaction import HIDDEN, without_secrets

_FROM_ENVIRONMENT = "comes from the environment and is not what it was"


def config_differences(saved: dict, checks: Mapping[str, str], cfg: DictConfig) -> list[str]:
    """Every key whose value changes the training and is not what it was, in words.

    Args:
        saved: config of the run that saved a checkpoint, as it is in the checkpoint.
        checks: of that run, as ``environment_checks`` made them.
        cfg: this run's config.
    """
    resolved = OmegaConf.to_container(cfg, resolve=True)
    # Earlier versions saved what is now left out of the file: passwords, and values from the environment
    configs = [without_secrets(saved), public_config(cfg), without_secrets(resolved)]
    saved, now, plain = json.loads(json.dumps(configs))
    found = []
    before, known, values = leaves(saved), leaves(plain), leaves(resolved)
    # The same value may have come from the environment then and not now, or the other way round
    for key, leaf in leaves(now).items():
        old = before.get(key)
        if old is None or may_differ(key):
            continue
        if key in checks and checks[key] != check_of(values[key]):
            is_from_environment = "${oc.env:" in f"{old.value}{leaf.value}"
            found.append(f"{key} " + (_FROM_ENVIRONMENT if is_from_environment else "is not what it was"))
        if key in checks or old.value in (known[key].value, HIDDEN):  # what was hidden then need not be hidden now
            old.holder[old.name] = leaf.value
    return found + _differences(saved, now)


def _differences(saved: dict, now: dict, prefix: str = "") -> list[str]:
    found = []
    for key in {**saved, **now}:
        if may_differ(f"{prefix}{key}"):
            continue
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            is_secret = isinstance(b, str) and "${oc.env:" in b  # and a is it, where an earlier version saved it
            found.append(f"{prefix}{key} " + (_FROM_ENVIRONMENT if is_secret else f"is {b!r}, was {a!r}"))
    return found
