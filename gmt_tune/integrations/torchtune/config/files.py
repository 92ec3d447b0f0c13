"""Refuses configs whose files are not there, cannot be read or written, or are of another model."""

import inspect
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from torch import nn
from torchtune.config._utils import _get_component_from_path
from torchtune.training.checkpointing._utils import FormattedCheckpointFiles

from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune.config.keys import is_number

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

# The rotary base of a config.json that names none, as Llama 2's first ones: transformers' default for these families.
_ROPE_THETA = 10000.0

# Keys of a config.json to what torchtune's builders call them, where they take them.
_KEYS_OF_BUILDERS = {"rope_theta": "rope_base", "rms_norm_eps": "norm_eps"}

# Keys of a config.json to where torchtune's models have them.
_PARTS_OF_MODELS = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "layers.0.attn.num_kv_heads",
    "head_dim": "layers.0.attn.head_dim",
    "intermediate_size": "layers.0.mlp.w1.out_features",
    "rms_norm_eps": "norm.eps",
    "rope_theta": "layers.0.attn.pos_embeddings.base",
}

# What stretches positions in Llama 3.1 and 3.2: key in a config.json, torchtune's name, and the releases' value.
_LLAMA3_SCALING = {
    "factor": ("scale_factor", 8.0),
    "low_freq_factor": ("low_freq_factor", 1.0),
    "high_freq_factor": ("high_freq_factor", 4.0),
    "original_max_position_embeddings": ("old_context_len", 8192.0),
}


def check_files(cfg: DictConfig, model: nn.Module) -> None:
    """Check the files and folders that a config names, and that a model's files fit the model that the config builds.

    The model may be on the meta device. Raises UserError for the first that is wrong.
    """
    for section in _CHECKPOINTERS:
        if cfg.get(section, None) is not None:
            _check_model_files(section, cfg[section])
            _check_family(cfg, section, model)
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


def _check_model_files(section: str, checkpointer: DictConfig) -> None:
    for key in ("output_dir", "checkpoint_dir"):
        if key not in checkpointer:
            raise UserError(f"{section}.{key} is missing in the config: name a folder")
    folder = Path(checkpointer.checkpoint_dir)
    if not folder.is_dir():
        raise UserError(
            f"{section}.checkpoint_dir {folder} does not exist: download the model first, as the first lines of "
            "the config say, or name the folder that holds it"
        )
    names = _file_names(section, checkpointer.get("checkpoint_files", None))
    for name in names:
        _check_weights_file(section, folder / name, folder)
    _check_no_shard_is_missing(section, names, folder)
    if "HF" in checkpointer._component_ and not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'} is missing: checkpoint_dir must be a Hugging Face model folder")


def _file_names(section: str, files: object) -> list[str]:
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


def _check_family(cfg: DictConfig, section: str, model: nn.Module) -> None:
    """Compare a Hugging Face config.json, where there is one, with the model that the config builds."""
    config_json = Path(cfg[section].checkpoint_dir) / "config.json"
    if not config_json.is_file():
        return
    try:
        theirs = dict(json.loads(config_json.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{config_json} is no valid JSON ({one_line(error)}): download the model again") from None
    allowed = _FAMILIES.get(str(theirs.get("model_type")))
    ours = str(cfg[section].get("model_type", ""))
    if allowed and ours not in (*allowed, "REWARD"):
        raise UserError(
            f"{section}.model_type is {ours}, but {config_json.parent} holds a {theirs['model_type']} model: "
            f"set it to {' or '.join(allowed)} and choose the model builder that fits, or another checkpoint_dir"
        )
    built = _built(model)
    if ours == "REWARD":
        built.pop("tie_word_embeddings", None)  # its output layer is another
    theirs |= _rope_of(theirs)
    for key, value in built.items():
        read = theirs.get(key, None)
        are_numbers = is_number(read) and is_number(value)
        is_same = math.isclose(read, value, rel_tol=1e-6) if are_numbers else read == value  # type: ignore[arg-type]
        if value is not None and read is not None and not is_same:
            raise UserError(
                f"the model in {config_json.parent} has {key} {read}, but model ({cfg.model._component_}) "
                f"builds {value}: {_way_out(cfg.model, key, read)}, or choose another {section}.checkpoint_dir"
            )


def _way_out(cfg_model: DictConfig, key: str, value: Any) -> str:
    """How to build a model with a value of a config.json: by a key of its builder, or else by another builder."""
    name = _KEYS_OF_BUILDERS.get(key)
    if name is not None and name in inspect.signature(_get_component_from_path(cfg_model._component_)).parameters:
        return f"set model.{name}: {value}"
    return "choose torchtune's builder of this release, if it has one"


def _built(model: nn.Module) -> dict[str, Any]:
    """What a model is, by the keys of a Hugging Face config.json; empty for one of a kind that we do not know."""
    embeddings, layers = _part(model, "tok_embeddings.weight"), _part(model, "layers")
    if embeddings is None or not layers:
        return {}
    output = _part(model, "output")
    built = {
        "vocab_size": embeddings.shape[0],
        "hidden_size": embeddings.shape[1],
        "num_hidden_layers": len(layers),
        **{key: _part(model, path) for key, path in _PARTS_OF_MODELS.items()},
        "tie_word_embeddings": hasattr(output, "tied_module") or _part(output, "weight") is embeddings,
    }
    if built["rope_theta"] is not None:
        positions = _part(model, "layers.0.attn.pos_embeddings")
        scaling = {key: _part(positions, ours) for key, (ours, _) in _LLAMA3_SCALING.items()}
        built["rope_scaling"] = _scaling(None if scaling["factor"] is None else "llama3", scaling)
    return built


def _part(model: Any, path: str) -> Any:
    """An attribute of an attribute of a model; None where there is none."""
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


def _rope_of(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of a config.json, in which transformers 5 has both in ``rope_parameters``."""
    rope = theirs.get("rope_parameters", None)
    if not isinstance(rope, dict):
        scaling = theirs.get("rope_scaling", None)
        rope = {"rope_theta": theirs.get("rope_theta", None), **(scaling if isinstance(scaling, dict) else {})}
    if any(isinstance(value, dict) for value in rope.values()):
        return {}  # other ones for other layers, as in no model that torchtune builds
    theta = rope.get("rope_theta", None)
    if theta is None and str(theirs.get("model_type")) in _FAMILIES:
        theta = _ROPE_THETA
    return {"rope_theta": theta, "rope_scaling": _scaling(rope.get("rope_type", rope.get("type", None)), rope)}


def _scaling(kind: object, rope: Mapping[str, Any]) -> str:
    """How positions are stretched, in words that are the same for what computes the same."""
    factor = rope.get("factor", None)
    # "dynamic" begins to stretch beyond the positions that the model was trained on
    if kind in (None, "default", "dynamic") or factor == 1:
        return "none"
    if kind != "llama3":
        return f"{kind}" if factor is None else f"{kind} (factor {factor})"
    values = {key: rope.get(key, default) for key, (_, default) in _LLAMA3_SCALING.items()}
    return f"llama3 ({', '.join(f'{k} {float(v) if is_number(v) else v}' for k, v in values.items())})"


def _check_is_writable(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{key} {folder} cannot be written ({reason}): choose another {key}") from None
