"""Folders of a small model and of what it became."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYER = "model.layers.{}.self_attn.q_proj.weight"


def changed(tensor: torch.Tensor, density: float, seed: int = 1) -> torch.Tensor:
    """Other values in that part of a tensor's entries."""
    generator = torch.Generator().manual_seed(seed)
    moved = torch.rand(tensor.shape, generator=generator) < density
    return torch.where(moved, tensor + 0.25, tensor)


def save_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **files: str) -> Path:
    """A model's folder, with a config and a tokenizer; ``files`` by name, with ``__`` for the dot."""
    folder.mkdir(parents=True)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    for i, name in enumerate(names):
        part = {key: tensors[key] for key in list(tensors)[i::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    files = {"config__json": '{"model_type": "llama"}', "tokenizer__json": '{"vocabulary": 1}', **files}
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run_command(arguments: list[str]) -> None:
    """`gmt-tune` with these arguments, for a process of its own."""
    from gmt_tune.cli.main import main

    main(arguments)
