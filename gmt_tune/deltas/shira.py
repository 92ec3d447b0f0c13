"""A delta as an adapter that PEFT loads: SHiRA (Bhardwaj et al., NeurIPS 2024), sparse additions to linear layers.

PEFT keeps as many entries for each layer, ``r`` times its inputs and outputs together, as the layer that changed most
needs; the others are filled up with zeros. Norms, which SHiRA does not know, are saved whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gmt_tune.deltas.file_format import Delta, Pair, TensorInfo, Watch
from gmt_tune.deltas.folders import folder_aside
from gmt_tune.deltas.source import Source
from gmt_tune.errors import UserError
from gmt_tune.reporting.safetensors_file import encode_header, torch_dtype, write_file

_PREFIX = "base_model.model."  # of a parameter's name in the model that PEFT makes


def write_adapter(base: Path, delta: Delta, out: Path, *, watch: Watch = iter) -> None:
    """Write the folder that ``PeftModel.from_pretrained(base, out)`` takes.

    Args:
        base: folder of the base.
        delta: of a model whose linear layers and norms alone changed.
        out: folder to make, which is there when it is whole.
        watch: wraps names of tensors as they are gone through, for a progress bar.

    Raises:
        UserError: if PEFT cannot hold what changed, ``base`` is not the delta's, or ``out`` cannot be written.
    """
    changed = delta.changed_tensors()
    # Under each name of tied layers, which share a pair
    embeddings = {pair.name for name, pair in changed.items() if "embed" in name}
    infos = {name: _checked(delta, name, pair, is_embedding=pair.name in embeddings) for name, pair in changed.items()}
    linear = {name: info for name, info in infos.items() if len(info.shape) == 2}
    infos = linear | infos  # these first: of 4 bytes an entry, they leave all others aligned
    rank = max((math.ceil(changed[name].changed / sum(info.shape)) for name, info in linear.items()), default=1)
    for name, info in linear.items():
        if rank * sum(info.shape) > info.numel:
            raise UserError(
                f"no SHiRA adapter holds {delta.path}: its most changed layer needs r = {rank}, for which {name} "
                f"{list(info.shape)} is too small; use the delta itself"
            )
    model = Source(base, delta, "base")
    header, end = {}, 0
    for name, info in infos.items():
        numel = rank * sum(info.shape)
        module = _PREFIX + name.removesuffix(".weight")
        entries = [(_PREFIX + name, info.dtype, list(info.shape))]
        if name in linear:
            entries = [(f"{module}.shira_weight", "F32", [numel]), (f"{module}.shira_indices", "I32", [2, numel])]
        for key, dtype, shape in entries:
            begin, end = end, end + math.prod(shape) * (4 if name in linear else torch_dtype(dtype).itemsize)
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    config = {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": delta.base_name,
        "inference_mode": True,
        "r": rank,
        "mask_type": "none",  # places come from the file
        "target_modules": sorted(name.removesuffix(".weight") for name in linear),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in infos if name not in linear}) or None,
    }
    with folder_aside(out) as part:
        pieces = (
            piece
            for name in watch(list(infos))
            for piece in (_additions if name in linear else _whole)(model, delta, changed[name], rank)
        )
        write_file(part / "adapter_model.safetensors", encode_header(header), pieces)
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _checked(delta: Delta, name: str, pair: Pair, *, is_embedding: bool) -> TensorInfo:
    """A tensor as it is in the tuned model, if PEFT can hold what changed of it."""
    info, module = delta.info("tuned", pair), name.rpartition(".")[0]
    assert info is not None
    weight = delta.plan.tuned.tensors.get(f"{module}.weight", info)
    kind = ""
    if is_embedding or not module or len(info.shape) > 2:
        kind = "no linear layer and no norm"
    elif name != f"{module}.weight" and len(weight.shape) > 1:
        kind = f"the {name.rpartition('.')[2]} of a linear layer"
    if kind:
        raise UserError(
            f"no SHiRA adapter holds {delta.path}: {name}, which changed, is {kind}; train with it frozen, or use the "
            "delta itself"
        )
    return info


def _values(model: Source, delta: Delta, pair: Pair) -> Iterator[tuple[int, np.ndarray, torch.Tensor, torch.Tensor]]:
    """Of each block: its first entry, the changed ones, and old and new values of all."""
    dtype = torch_dtype(delta.dtype(pair))
    for entries, (start, _, (indices, bits)) in model.blocks(pair):
        old = torch.from_numpy(entries.copy()).view(dtype)
        entries[indices] ^= bits
        yield start, indices, old, torch.from_numpy(entries).view(dtype)


def _additions(model: Source, delta: Delta, pair: Pair, rank: int) -> Iterator[np.ndarray]:
    info = delta.info("tuned", pair)
    assert info is not None
    weight = np.zeros(rank * sum(info.shape), dtype=np.float32)
    places = np.zeros((2, len(weight)), dtype=np.int32)
    done = 0
    for start, indices, old, new in _values(model, delta, pair):
        part = slice(done, done := done + len(indices))
        weight[part] = (new[indices].float() - old[indices].float()).numpy()
        places[:, part] = np.divmod(start + indices, info.shape[1])
    yield weight
    yield places


def _whole(model: Source, delta: Delta, pair: Pair, rank: int) -> Iterator[np.ndarray]:
    info = delta.info("tuned", pair)
    assert info is not None
    for _, _, _, new in _values(model, delta, pair):
        yield new.to(torch_dtype(info.dtype)).view(torch.uint8).numpy()
