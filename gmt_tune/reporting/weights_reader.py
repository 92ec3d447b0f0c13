"""Reads the weights of a Hugging Face folder piece by piece: any sharding, never more than a slice in memory."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gmt_tune.errors import UserError

__all__ = ["Weights"]


class TensorInfo(NamedTuple):
    """Where a tensor lies and what it is; ``dtype`` is safetensors' name for it, such as ``BF16``."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Weights:
    """The tensors, by name, of a folder with ``*.safetensors``, sharded or not, or of one such file.

    Args:
        path: the folder or the file.

    Attributes:
        ties_embeddings: whether the folder's ``config.json`` says that the output layer is the embedding.

    Raises:
        UserError: if there is nothing to read, or a file is incomplete.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.tensors: dict[str, TensorInfo] = {}
        for file in _files(self.path):
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    part = handle.get_slice(name)
                    self.tensors[name] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
        self.ties_embeddings = _ties_embeddings(self.path)

    @property
    def files(self) -> set[Path]:
        """Those that hold the tensors."""
        return {info.file for info in self.tensors.values()}

    def slices(self, name: str, numel: int) -> Iterator[Tensor]:
        """The entries of the tensor ``name`` in order, 1-d, in slices of about ``numel``: of whole
        rows, where these are shorter."""
        file, shape, _ = self.tensors[name]
        row = math.prod(shape[1:]) or 1
        size = numel if row > numel else numel // row * row
        for start in range(0, math.prod(shape), size):
            # The file is mapped into memory: what was read of it counts as this process's memory until it is closed
            with _open(file) as handle:
                try:
                    tensor = handle.get_tensor(name)
                except SafetensorError as error:
                    raise UserError(f"{file} cannot be read at '{name}' ({error}): copy it again") from None
                part = tensor.view(-1)[start : start + size].clone()
                del tensor  # a view of the file
            yield part


def _files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if path.is_file():
        raise UserError(f"{path} is no safetensors file: name a folder with *.safetensors, or one such file")
    if not path.is_dir():
        raise UserError(f"{path} does not exist: name a folder with *.safetensors, or one such file")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{index} is no index of safetensors files: copy it again") from None
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(f"{path} lacks {missing[0]}, which its index names: copy it again")
        return [path / name for name in names]
    # Folders of some models hold the same weights a second time, under other names, in consolidated*.safetensors
    found = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if found:
        return found
    inner = sorted({file.parent for file in path.glob("*/*.safetensors")}, key=lambda folder: folder.stat().st_mtime)
    if inner:
        raise UserError(f"{path} holds no *.safetensors itself: did you mean {inner[-1]}?")
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise UserError(f"{path} holds no *.safetensors, only PyTorch files: save the model as safetensors first")
    raise UserError(f"{path} holds no *.safetensors: name a model's folder in Hugging Face's format")


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no complete safetensors file ({error}): copy it again") from None


def _ties_embeddings(path: Path) -> bool:
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("tie_word_embeddings", False))
    except (OSError, ValueError, AttributeError):
        return False
