"""Reads the weights of a Hugging Face folder piece by piece: any sharding, never more than a slice in memory."""

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from gmt_tune.errors import UserError
from gmt_tune.reporting.safetensors_file import TensorInfo, read_infos, read_piece

__all__ = ["Weights"]

DELTA = "delta.safetensors"  # beside a model's own files, what recipes write as ``gmt-tune delta`` does


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
            self.tensors |= read_infos(file)[0]
        self.ties_embeddings = _ties_embeddings(self.path)

    @property
    def files(self) -> set[Path]:
        """Those that hold the tensors."""
        return {info.file for info in self.tensors.values()}

    def slices(self, name: str, numel: int) -> Iterator[Tensor]:
        """The entries of a tensor in order, 1-d, in slices of ``numel``, of which the last may be shorter."""
        info = self.tensors[name]
        with open(info.file, "rb") as stream:
            for start in range(0, info.numel, numel):
                yield read_piece(stream, info, start, min(numel, info.numel - start))


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
    delta = path / DELTA
    found = sorted(path.glob("model*.safetensors")) or sorted({*path.glob("*.safetensors")} - {delta})
    if found:
        return found
    if delta.is_file():
        raise UserError(f"{path} holds no weights, only a delta: make them with `gmt-tune apply BASE {delta} DIR`")
    inner = sorted({file.parent for file in path.glob("*/*.safetensors")}, key=lambda folder: folder.stat().st_mtime)
    if inner:
        raise UserError(f"{path} holds no *.safetensors itself: did you mean {inner[-1]}?")
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise UserError(f"{path} holds no *.safetensors, only PyTorch files: save the model as safetensors first")
    raise UserError(f"{path} holds no *.safetensors: name a model's folder in Hugging Face's format")


def _ties_embeddings(path: Path) -> bool:
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("tie_word_embeddings", False))
    except (OSError, ValueError, AttributeError):
        return False
