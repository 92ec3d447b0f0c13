"""Refuses configs whose files are not there, cannot be read or written, or are of another model."""

import inspect
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from torch import nn
from torchtune import training
from torchtune.config._utils import _get_component_from_path
from torchtune.training.checkpointing._utils import FormattedCheckpointFiles

from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune.config.release import OF_MODULES, check_release
from gmt_tune.models.checkpointer import FullModelHFCheckpointer, family_of

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")

# Sources that are kinds of files, which ``datasets`` then looks for as they are named.
_KINDS_OF_FILES = ("json", "csv", "text", "parquet", "arrow", "xml", "pandas")

# Sections that name files of a model; the second is that of a recipe with a reference model.
_CHECKPOINTERS = ("checkpointer", "ref_checkpointer")


def check_files(cfg: DictConfig, model: nn.Module, *, needs_weights: bool = True) -> None:
    """Check the files and folders that a config names, and that a model's files fit the model that the config builds.

    The model may be on the meta device. Without ``needs_weights``, files of weights may lack. Raises UserError for the
    first that is wrong.
    """
    for section in _CHECKPOINTERS:
        if cfg.get(section, None) is not None:
            _check_model_files(section, cfg[section], needs_weights)
            check_release(cfg, section, model)
    for key in ("path", "merges_file"):
        path = cfg.tokenizer.get(key, None)
        if isinstance(path, str) and not Path(path).is_file():
            raise UserError(f"tokenizer.{key} {path} does not exist: name the tokenizer file of the model")
    for section in ("dataset", "dataset_val"):
        parts = cfg.get(section, None)
        for part in parts if isinstance(parts, ListConfig) else [parts]:
            if part is not None:
                _check_data_files(section, part)
    for key in ("output_dir", "checkpointer.output_dir", "metric_logger.log_dir"):
        folder = OmegaConf.select(cfg, key)
        if folder is not None:
            _check_is_writable(key, Path(str(folder)))


def _check_data_files(section: str, dataset: DictConfig) -> None:
    """As ``datasets.load_dataset`` will look for it: from here, or from a folder that is the source."""
    data_files, source = dataset.get("data_files", None), dataset.get("source", None)
    if not isinstance(data_files, str) or not isinstance(source, str) or dataset.get("data_dir", None) is not None:
        return
    folder = Path() if source in _KINDS_OF_FILES else Path(source)  # which is no folder for a repository on the hub
    is_pattern = re.search(r"[*?[]|://", data_files) is not None
    if folder.is_dir() and not is_pattern and not (folder / data_files).is_file():
        raise UserError(f"{section}.data_files {data_files} does not exist: name the file with the rows")


def _check_model_files(section: str, checkpointer: DictConfig, needs_weights: bool = True) -> None:
    for key in ("output_dir", "checkpoint_dir"):
        if key not in checkpointer:
            raise UserError(f"{section}.{key} is missing in the config: name a folder")
    folder = Path(checkpointer.checkpoint_dir)
    if not folder.is_dir():
        raise UserError(
            f"{section}.checkpoint_dir {folder} does not exist: download the model first, as the first lines of "
            "the config say, or name the folder that holds it"
        )
    names = file_names(section, checkpointer.get("checkpoint_files", None))
    for name in names:
        if needs_weights or (folder / name).is_file():
            _check_weights_file(section, folder / name, folder)
    _check_no_shard_is_missing(section, names, folder)
    _check_model_type(section, checkpointer)
    if "HF" in checkpointer._component_ and not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'} is missing: checkpoint_dir must be a Hugging Face model folder")


def _check_model_type(section: str, checkpointer: DictConfig) -> None:
    """Raise UserError if a Hugging Face checkpointer has no way to convert the weights of a ``model_type``."""
    component = _get_component_from_path(checkpointer._component_)
    if not (inspect.isclass(component) and issubclass(component, training.FullModelHFCheckpointer)):
        return
    kind = checkpointer.get("model_type", None)
    is_module = kind is not None and family_of(kind, f"{section}.model_type") is not None
    if is_module and not issubclass(component, FullModelHFCheckpointer):
        raise UserError(
            f"{section}.model_type {kind} is a module, which {checkpointer._component_} does not take: set "
            f"{section}._component_={OF_MODULES}"
        )


def file_names(section: str, files: object) -> list[str]:
    """The names in ``checkpoint_files``: a list, or torchtune's ``filename_format`` with ``max_filename``."""
    if isinstance(files, DictConfig):
        try:
            return FormattedCheckpointFiles.from_dict(OmegaConf.to_container(files)).build_checkpoint_filenames()
        except (TypeError, ValueError) as error:
            raise UserError(f"{section}.checkpoint_files: {one_line(error)}") from None
    if not isinstance(files, ListConfig) or not len(files):
        raise UserError(f"{section}.checkpoint_files must be a list of file names, got {files!r}")
    return [str(name) for name in files]


def _check_no_shard_is_missing(section: str, names: Sequence[str], folder: Path) -> None:
    """Raise UserError if some files of a model are given, but not all: as its index has them, or their numbers."""
    for given in names:
        shards = _shards_of(given, folder)
        missing = [shard for shard in shards if shard not in names]
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise UserError(
                f"{section}.checkpoint_files names {len(shards) - len(missing)} of the {len(shards)} files that the "
                f"model in {folder} is split into: name all of them, also {', '.join(missing[:4])}{more}"
            )


def _shards_of(name: str, folder: Path) -> list[str]:
    """The files that a model is split into, of which one is given; none if it is not split."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            continue  # it is only an aid: the loader does not read it
        if name in shards:
            return sorted(shards)
    numbers = re.fullmatch(r"(.*?)(\d+)([-_]of[-_])(\d+)(\D*)", name)
    if numbers is None:
        return []
    before, number, of, total, after = numbers.groups()
    first = 0 if int(number) == 0 else 1
    return [f"{before}{i + first:0{len(number)}d}{of}{total}{after}" for i in range(int(total))]


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


def _check_is_writable(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{key} {folder} cannot be written ({reason}): choose another {key}") from None
