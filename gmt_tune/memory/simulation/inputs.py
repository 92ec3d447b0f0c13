"""What a simulated run reads in place of files: weights, rows and a tokenizer of the config's sizes, without values."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torchtune import config, training

Tokenizer = SimpleNamespace  # pad_id, max_seq_len


class Logger:
    """A metric logger that logs nothing."""

    def log_config(self, config: Any) -> None: ...
    def log_dict(self, payload: Mapping[str, Any], step: int) -> None: ...
    def close(self) -> None: ...


class Rows:
    """Rows of a length, as many as are asked for: of ``gmt_full_finetune``, or pairs of ``gmt_full_dpo``."""

    def __init__(self, tokenizer: Any, *, length: int, pairs: bool) -> None:
        keys = [f"{kind}_{key}" for kind in ("chosen", "rejected") for key in ("input_ids", "labels")]
        self._row = dict.fromkeys(keys if pairs else ("tokens", "labels"), [1] * length)

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> Mapping[str, list[int]]:
        return dict(self._row)


class Checkpointer:
    """Gives the weights of a model that is made from its section of the config, on the CPU."""

    def __init__(self, *, model: Any, dtype: str, should_load_recipe_state: bool = False, **ignored: Any) -> None:
        self._model, self._dtype = model, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]

    def load_checkpoint(self) -> dict[str, Any]:
        with torch.device("meta"):
            weights = config.instantiate(OmegaConf.create(self._model)).state_dict()
        return {training.MODEL_KEY: {k: torch.empty(w.shape, dtype=self._dtype) for k, w in weights.items()}}
