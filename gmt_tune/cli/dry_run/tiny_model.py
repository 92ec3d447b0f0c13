"""A small model of a config's own family, with random weights, in the files that the config's checkpointer reads."""

from __future__ import annotations

import inspect
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import config, training, utils
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import TransformerDecoder

from gmt_tune._quiet import quieter
from gmt_tune.errors import UserError, one_line
from gmt_tune.integrations.torchtune.config.release import described

# Low-bit states come in blocks of 256 entries.
SIZES = {"num_layers": 2, "num_heads": 4, "embed_dim": 32, "intermediate_dim": 128, "head_dim": 8}

# What a builder must take, so that it can be asked for a smaller model.
_NEEDED = ("num_layers", "num_heads", "embed_dim")

# A model of no more parameters is small enough as it is.
SMALL = 20_000_000

# What a Hugging Face config.json says of sizes. Of these, checkpointers need the first ones.
_NEEDED_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads")
_SIZES = (*_NEEDED_SIZES, "num_hidden_layers", "intermediate_size", "head_dim", "query_pre_attn_scalar")


def tiny_model(of: Mapping[str, Any]) -> TransformerDecoder:
    """The model of a config's section ``model``, with few and narrow layers; all else is as its builder makes it.

    The sizes are replaced where the builder, or a function that it calls, gives them to a component builder: one that
    takes ``num_layers``, ``num_heads`` and ``embed_dim``. The vocabulary stays. A model of at most :data:`SMALL`
    parameters is built as it is.

    Args:
        of: the section, with ``_component_``.

    Raises:
        UserError: if no function is found that takes sizes.
    """
    section = OmegaConf.create(dict(of))
    builder = _get_component_from_path(section._component_)
    arguments = {key: value for key, value in OmegaConf.to_container(section).items() if key != "_component_"}
    with torch.device("meta"):
        is_small = sum(p.numel() for p in builder(**arguments).parameters()) <= SMALL
    if not is_small and (builder := smaller(builder)) is None:
        raise UserError(
            f"model._component_ {section._component_} cannot be built smaller, which a dry run needs: let it call, or "
            f"be, a function that takes {', '.join(_NEEDED)}, as torchtune's builders do"
        )
    return builder(**arguments)


def smaller(builder: Callable) -> Callable | None:
    """A builder whose models have the sizes :data:`SIZES`; None if it gives sizes to no function that is found."""
    if isinstance(builder, partial):
        inner = smaller(builder.func)
        return None if inner is None else partial(inner, *builder.args, **builder.keywords)
    if _takes_sizes(builder):
        return _with_sizes(builder)
    if not isinstance(builder, FunctionType):
        return None
    called = {
        name: value
        for name in builder.__code__.co_names
        if callable(value := builder.__globals__.get(name)) and not inspect.isclass(value)
    }
    replaced = {name: new for name, value in called.items() if (new := smaller(value)) is not None}
    if not replaced:
        return None
    copy = FunctionType(
        builder.__code__,
        {**builder.__globals__, **replaced},
        builder.__name__,
        builder.__defaults__,
        builder.__closure__,
    )
    copy.__kwdefaults__ = builder.__kwdefaults__
    return copy


def _takes_sizes(function: Callable) -> bool:
    """Whether it is a component builder: a function of sizes and of the vocabulary."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "vocab_size" in parameters and all(name in parameters for name in _NEEDED)


def _with_sizes(function: Callable) -> Callable:
    signature = inspect.signature(function)

    @wraps(function)
    def build(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        sizes = dict(SIZES)
        if (heads := given.get("num_kv_heads")) is not None:  # grouped as before, or not
            sizes["num_kv_heads"] = 4 if heads == given["num_heads"] else 2
        changed = {name: size for name, size in sizes.items() if given.get(name) is not None}
        return function(**{**given, **changed})

    return build


def write_tiny_model(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Write random weights of the small model, as the config's checkpointer would.

    Args:
        cfg: with its own ``checkpointer``, whose other files than weights are read.
        folder: exists, and is empty.

    Returns:
        ``checkpoint_dir`` and ``checkpoint_files`` for a checkpointer.

    Raises:
        UserError: if the model cannot be built, or the checkpointer cannot write it.
    """
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg.dtype]
    with training.set_default_dtype(dtype):
        torch.manual_seed(0)
        try:
            model = tiny_model(OmegaConf.to_container(cfg.model, resolve=True))
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)  # as most models are before their training
            built = described(model)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"model ({cfg.model._component_}) cannot be built with few and narrow layers: {one_line(error)}"
            ) from error
    given, source = Path(cfg.checkpointer.checkpoint_dir), folder / "empty"
    source.mkdir()
    stub = source / "model.safetensors"
    stub.touch()
    for name in ("config.json", "generation_config.json"):
        if (given / name).is_file():
            shutil.copyfile(given / name, source / name)
    if (source / "config.json").is_file():
        release = json.loads((source / "config.json").read_text(encoding="utf-8"))
        release |= {key: built[key] for key in _SIZES if built and (key in release or key in _NEEDED_SIZES)}
        (source / "config.json").write_text(json.dumps(release, indent=2), encoding="utf-8")
    section = OmegaConf.to_container(cfg.checkpointer, resolve=True)
    assert isinstance(section, dict)
    section |= {"checkpoint_dir": str(source), "checkpoint_files": [stub.name], "output_dir": str(folder / "written")}
    section |= {"recipe_checkpoint": None}
    try:
        with quieter(utils.get_logger()):
            checkpointer: Any = config.instantiate(OmegaConf.create(section))
            checkpointer._weight_map = defaultdict(lambda: "0001")  # all weights in one file
            weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
            checkpointer.save_checkpoint({training.MODEL_KEY: weights}, epoch=0)
    except Exception as error:  # a checkpointer of the user's may raise anything
        raise UserError(
            f"checkpointer ({section['_component_']}) cannot write the small model of a dry run: "
            f"{one_line(error, with_type=True)}"
        ) from error
    (made,) = (folder / "written").glob("epoch_0")
    files = sorted(p.name for p in made.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    return {"checkpoint_dir": str(made), "checkpoint_files": files}
