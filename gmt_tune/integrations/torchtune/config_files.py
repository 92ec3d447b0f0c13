"""Refuses configs whose files are not there, cannot be read or written, or are of another model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from gmt_tune.errors import UserError

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")

# Sources that are kinds of files, which ``datasets`` then looks for as they are named.
_KINDS_OF_FILES = ("json", "csv", "text", "parquet", "arrow", "xml", "pandas")

# Sections that name files of a model; the second is that of a recipe with a reference model.
_CHECKPOINTERS = ("checkpointer", "ref_checkpointer")

# "model_type" of a Hugging Face config.json to the model types of torchtune's checkpointers.
_FAMILIES = {
    "llama": ("LLAMA2", "LLAMA3", "LLAMA3_2"),
    "mistral": ("MISTRAL",),
    "gemma": ("GEMMA",),
    "gemma2": ("GEMMA2",),
    "phi3": ("PHI3_MINI", "PHI4"),
    "qwen2": ("QWEN2",),
}


def check_files(cfg: DictConfig, model: nn.Module) -> None:
    """Check the files and folders that a config names, and that the files of a model fit the model that it builds.

    Args:
        cfg: the config.
        model: that it builds; may be on the meta device.

    Raises:
        UserError: for the first that is wrong.
    """
    _check_folder("output_dir", cfg.output_dir)
    for section in _CHECKPOINTERS:
        if cfg.get(section, None) is not None:
            _check_model_files(section, cfg[section])
    for key in ("path", "merges_file"):
        path = cfg.tokenizer.get(key, None)
        if isinstance(path, str) and not Path(path).is_file():
            raise UserError(f"tokenizer.{key} {path} does not exist: name the tokenizer file of the model")
    for section in ("dataset", "dataset_val"):
        part = cfg.get(section, None)
        for one in part if isinstance(part, ListConfig) else [part]:
            if one is not None:
                _check_data_files(section, one)
    for section in _CHECKPOINTERS:
        if cfg.get(section, None) is not None:
            _check_family(cfg, section, model)
    folders = {
        "output_dir": cfg.output_dir,
        "checkpointer.output_dir": cfg.checkpointer.output_dir,
        "metric_logger.log_dir": cfg.metric_logger.get("log_dir", None),
    }
    for key, folder in folders.items():
        if folder is not None:
            _check_is_writable(key, Path(str(folder)))


def _check_data_files(section: str, dataset: DictConfig) -> None:
    """As ``datasets.load_dataset`` will look for it: from here, or from a folder that is the source."""
    data_files, source = dataset.get("data_files", None), dataset.get("source", None)
    if not isinstance(data_files, str) or any(c in data_files for c in "*?[") or "://" in data_files:
        return
    if dataset.get("data_dir", None) is not None or not isinstance(source, str):
        return
    if source in _KINDS_OF_FILES:
        file = Path(data_files)
    elif Path(source).is_dir():
        file = Path(source) / data_files
    else:  # of a repository on the hub
        return
    if not file.is_file():
        raise UserError(f"{section}.data_files {data_files} does not exist: name the file with the rows")


def _check_folder(key: str, path: object) -> None:
    if not isinstance(path, str) or not path:
        raise UserError(f"{key} must be the path of a folder, got {path!r}")


def _check_model_files(section: str, checkpointer: DictConfig) -> None:
    for key in ("output_dir", "checkpoint_dir"):
        _check_folder(f"{section}.{key}", checkpointer.get(key, None))
    folder = Path(checkpointer.checkpoint_dir)
    if not folder.is_dir():
        raise UserError(
            f"{section}.checkpoint_dir {folder} does not exist: download the model first, as the first lines of "
            "the config say, or name the folder that holds it"
        )
    files = checkpointer.get("checkpoint_files", None)
    if not isinstance(files, (ListConfig, DictConfig)):
        raise UserError(f"{section}.checkpoint_files must be a list of file names, got {files!r}")
    if isinstance(files, ListConfig):
        for name in files:
            _check_weights_file(section, folder / str(name), folder)
    if "HF" in checkpointer._component_ and not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'} is missing: checkpoint_dir must be a Hugging Face model folder")


def _check_weights_file(section: str, file: Path, folder: Path) -> None:
    if not file.is_file():
        there = sorted(p.name for p in folder.glob("*") if p.suffix in _SUFFIXES)
        raise UserError(
            f"{section}.checkpoint_files names {file.name}, which is not in {folder} "
            f"(there: {', '.join(there) or 'no weights'})"
        )
    if file.suffix not in _SUFFIXES:
        raise UserError(
            f"{section}.checkpoint_files names {file.name}, which is no file of weights (those end in "
            f"{', '.join(_SUFFIXES)})"
        )
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or no safetensors file ({error}): download it again") from None


def _check_family(cfg: DictConfig, section: str, model: Any) -> None:
    """Compare a Hugging Face config.json, where there is one, with the model that the config builds."""
    config_json = Path(cfg[section].checkpoint_dir) / "config.json"
    if not config_json.is_file():
        return
    try:
        theirs = json.loads(config_json.read_text())
    except ValueError as error:
        raise UserError(f"{config_json} is no valid JSON ({error}): download the model again") from None
    allowed = _FAMILIES.get(theirs.get("model_type"))
    ours = str(cfg[section].get("model_type", ""))
    if allowed and ours not in (*allowed, "REWARD"):
        raise UserError(
            f"{section}.model_type is {ours}, but {config_json.parent} holds a {theirs['model_type']} model: "
            f"set it to {' or '.join(allowed)} and choose the model builder that fits, or another checkpoint_dir"
        )
    embeddings = getattr(getattr(model, "tok_embeddings", None), "weight", None)
    if embeddings is None:
        return  # a model of a kind that is not ours to compare
    built = {
        "vocab_size": embeddings.shape[0],
        "hidden_size": embeddings.shape[1],
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": getattr(model, "num_heads", None),
        "num_key_value_heads": getattr(getattr(model.layers[0], "attn", None), "num_kv_heads", None),
        "intermediate_size": getattr(getattr(getattr(model.layers[0], "mlp", None), "w1", None), "out_features", None),
    }
    for key, value in built.items():
        if value is not None and theirs.get(key, value) != value:
            raise UserError(
                f"the model in {config_json.parent} has {key} {theirs[key]}, but model ({cfg.model._component_}) "
                f"builds {value}: choose the builder that fits, or another {section}.checkpoint_dir"
            )


def _check_is_writable(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{key} {folder} cannot be written ({reason}): choose another {key}") from None
