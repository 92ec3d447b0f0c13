"""Reads and writes safetensors files piece by piece: the library maps a file into memory, or wants all tensors at once.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length, the header, which is
JSON and says where each tensor lies, then the tensors' bytes. Whether a file is one, and whole, the library says.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from gmt_tune.errors import UserError


class TensorInfo(NamedTuple):
    """Where a tensor lies and what it is; ``dtype`` is safetensors' name for it, such as ``BF16``."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    def is_like(self, other: TensorInfo) -> bool:
        """Whether shape and dtype are the same."""
        return (self.shape, self.dtype) == (other.shape, other.dtype)


def read_infos(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """A file's tensors by name, and its metadata.

    Raises:
        UserError: if it is not a whole safetensors file.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no complete safetensors file ({error}): copy it again") from None
    header = read_header(file)
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    begin = 8 + len(header)
    return {
        name: TensorInfo(file, tuple(entry["shape"]), entry["dtype"], begin + entry["data_offsets"][0])
        for name, entry in entries.items()
    }, metadata


def read_header(file: Path) -> bytes:
    """The header, as it is in a whole file."""
    with open(file, "rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def read_piece(stream: BinaryIO, info: TensorInfo, start: int, numel: int) -> Tensor:
    """Entries of a tensor, 1-d, from its entry ``start`` on.

    Raises:
        UserError: if the file ends before, or cannot be read.
    """
    dtype = torch_dtype(info.dtype)
    piece = bytearray(numel * dtype.itemsize)
    try:
        stream.seek(info.offset + start * dtype.itemsize)
        found = stream.readinto(piece)  # type: ignore[attr-defined]
    except OSError as error:  # such as EIO from a failing disk
        raise UserError(f"{info.file} cannot be read ({error.strerror or error}): copy it again") from None
    if found != len(piece):
        raise UserError(f"{info.file} ends before its last tensor: copy it again")
    return torch.frombuffer(piece, dtype=torch.uint8).view(dtype) if piece else torch.empty(0, dtype=dtype)


@functools.cache
def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for safetensors' name of it, by the library's own table."""
    header = encode_header({"x": {"dtype": name, "shape": [0], "data_offsets": [0, 0]}})
    return load(len(header).to_bytes(8, "little") + header)["x"].dtype


def encode_header(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A header of ``dtype``, ``shape`` and ``data_offsets`` by the tensors' names, and of ``__metadata__``."""
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return encoded + b" " * (-len(encoded) % 8)


def write_file(file: str | os.PathLike, header: bytes, data: Iterable[Any]) -> None:
    """Write a file, and hold none of its pieces when the next is asked for.

    Args:
        header: of :func:`encode_header` or :func:`read_header`.
        data: the tensors' bytes in the order of their offsets, in pieces of any size, as ``write`` takes them.
    """
    with open(file, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for _ in map(stream.write, data):
            pass
