"""What training on pairs of answers needs besides: its own keys of a config, and rows that are pairs."""

import inspect
from collections.abc import Mapping

from omegaconf import DictConfig, ListConfig
from torchtune import config

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config.keys import is_number

# Top-level keys that a recipe for supervised fine-tuning does not have.
OWN_KEYS = ("ref_checkpointer",)

_LOSSES = "torchtune.rlhf.loss.DPOLoss or torchtune.rlhf.loss.RSOLoss"
_ROW = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def check_preference_config(cfg: DictConfig) -> None:
    """Raise UserError for what is wrong with preference data in a config that ``check_config`` has passed."""
    if cfg.get("ref_checkpointer", None) is None:
        raise UserError(
            "ref_checkpointer is missing in the config: add a section like checkpointer that names the model before "
            "training, which rewards are measured against (`tune cat quickstart_dpo` shows one)"
        )
    _check_loss(cfg.loss)
    for key in ("dataset", "dataset_val"):
        section = cfg.get(key, None)
        for part in section if isinstance(section, ListConfig) else [section]:
            if part is not None and part.get("packed", False):
                raise UserError(f"{key}.packed: pairs of answers cannot be packed: remove the key")


def _check_loss(cfg_loss: DictConfig) -> None:
    loss = config.instantiate(cfg_loss)
    call = getattr(loss, "forward", loss)
    try:
        inspect.signature(call).bind(*[None] * 4)
    except (TypeError, ValueError):
        raise UserError(
            f"loss._component_ {cfg_loss._component_} is no loss of preferences, which takes the log probabilities of "
            f"the chosen and the rejected answer under both models: set it to {_LOSSES}"
        ) from None
    for key in ("beta", "gamma"):
        value = getattr(loss, key, 1.0)
        if not is_number(value) or not value > 0:
            raise UserError(f"loss.{key} must be a number above 0, such as 0.1, got {value!r}")
    smoothing = getattr(loss, "label_smoothing", 0.0)
    if not is_number(smoothing) or not 0 <= smoothing < 0.5:
        raise UserError(f"loss.label_smoothing must be a number from 0 to below 0.5, got {smoothing!r}")


def check_preference_row(row: object, key: str) -> None:
    """Raise UserError if a row of the config's section ``key`` is no tokenized pair of answers."""
    missing = [name for name in _ROW if not isinstance(row, Mapping) or name not in row]
    if missing:
        raise UserError(
            f"{key} gives rows without {', '.join(missing)}: it must be a data set of preferences, such as "
            "torchtune.datasets.preference_dataset"
        )
