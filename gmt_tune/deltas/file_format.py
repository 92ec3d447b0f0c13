"""How a delta lies in its safetensors file, and reading it block by block.

Of every tensor that changed, the file has two: ``NAME.bits``, 1-d integers as wide as an entry, the exclusive or of
old and new bits of the changed entries in their order; and ``NAME.indices``, 1-d uint8, which entries these are: for
each block of ``BLOCK`` entries 4 bytes (little-endian) with the length of what follows, as ``indices.encode`` coded
it, and behind the last one zeros up to a multiple of 8 bytes. Where the two models differ in dtype, both are cast to
one that holds both first; where in shape, the shorter one continues with zeros; a tensor that one of them lacks is all
zeros there.

``plan.json`` says what belongs together (:class:`Plan`); ``base/...`` and ``tuned/...`` are files other than weights,
of which the two folders have different ones. All of these are compressed with zlib. The header's metadata names the
format, the base and the digest of its weights, for people and for other programs.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from gmt_tune.deltas.indices import BLOCK, decode
from gmt_tune.errors import UserError
from gmt_tune.reporting.safetensors_file import TensorInfo, read_infos, read_piece, torch_dtype
from gmt_tune.reporting.weights_reader import Weights

FORMAT, VERSION = "gmt_tune.delta", "1"

Side: TypeAlias = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")

# Wraps names of tensors as they are gone through, for a progress bar
Watch: TypeAlias = Callable[[Iterable[str]], Iterable[str]]

# Bits of an entry, by its bytes
INT_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Between these, a tensor may have been cast
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Pair:
    """A tensor of the base and the one that it became.

    Attributes:
        base, tuned: their names; None where a model has none.
        changed: entries whose bits differ.
        crc32: of the bits that these had in the base, and have in the tuned model.
    """

    base: str | None
    tuned: str | None
    changed: int = 0
    crc32: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Of its tensors in the file."""
        name = self.tuned if self.base is None else self.base
        assert name is not None
        return name

    def of(self, side: Side) -> str | None:
        """Its name in one of the models."""
        return self.base if side == "base" else self.tuned


@dataclass(frozen=True)
class Folder:
    """What a model's folder holds.

    Attributes:
        headers: of its files with weights, by their names.
        sha256: of each tensor's bytes.
        pairs: by a tensor's name, the number of its pair; copies of a tensor share one.
        files: sha256 of the bytes of each other file.
    """

    headers: dict[str, str]
    sha256: dict[str, str]
    pairs: dict[str, int]
    files: dict[str, str]

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each tensor, and the name of its file."""
        return {
            name: TensorInfo(Path(file), tuple(entry["shape"]), entry["dtype"])
            for file, header in self.headers.items()
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
        }

    @property
    def digest(self) -> str:
        """Of all weights, however they are spread over files."""
        lines = [
            f"{name} {info.dtype} {list(info.shape)} {self.sha256[name]}\n"
            for name, info in sorted(self.tensors.items())
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What a delta is about: the two folders, and which of their tensors belong together."""

    base: Folder
    tuned: Folder
    pairs: list[Pair]

    def folder(self, side: Side) -> Folder:
        """One of the two."""
        return self.base if side == "base" else self.tuned

    def to_json(self) -> str:
        """For the file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse."""
        content = json.loads(text)
        pairs = [Pair(**{**pair, "crc32": tuple(pair["crc32"])}) for pair in content["pairs"]]
        return cls(Folder(**content["base"]), Folder(**content["tuned"]), pairs)


class Changes(NamedTuple):
    """Of a block: which of its entries changed, and the exclusive or of their old and new bits."""

    indices: np.ndarray
    bits: np.ndarray


_NO_CHANGES = Changes(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int8))


class Block(NamedTuple):
    """Entries ``start`` to ``start + numel`` of a flat tensor."""

    start: int
    numel: int
    changes: Changes


class Delta:
    """A delta's file. Its methods are for this package, and may change.

    Args:
        path: as ``gmt-tune delta`` or a recipe wrote it.

    Attributes:
        path: the file.
        base_name: of the base's folder, or on the hub.
        plan: what it is about.

    Raises:
        UserError: if it is no complete delta.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"{self.path} is no file: name a delta that `gmt-tune delta` or a recipe wrote")
        self._tensors, metadata = read_infos(self.path)
        if metadata.get("format") != FORMAT:
            raise UserError(f"{self.path} is no delta: name a file that `gmt-tune delta` or a recipe wrote")
        if metadata.get("version") != VERSION:
            raise UserError(
                f"{self.path} is a delta of version {metadata.get('version')}, and this gmt-tune reads {VERSION}: "
                "install the release that wrote it"
            )
        self.base_name = metadata.get("base", "")
        try:
            self.plan = Plan.from_json(self._unpacked("plan.json").decode())
            folders = [self.plan.folder(side) for side in SIDES]
            paths = [Path(name) for folder in folders for name in (*folder.headers, *folder.files)]
            if any(path.is_absolute() or ".." in path.parts for path in paths):
                raise ValueError("a file outside of the model's folder")
        except (KeyError, TypeError, ValueError):
            raise self.damaged() from None

    def damaged(self) -> UserError:
        """The error for a file that is not as it was written."""
        return UserError(f"{self.path} is damaged: copy it again")

    def file(self, side: Side, name: str) -> bytes | None:
        """The bytes of a file of one of the folders; None if the other folder has the same."""
        return self._unpacked(f"{side}/{name}") if f"{side}/{name}" in self._tensors else None

    def blocks(self, pair: Pair) -> Iterator[Block]:
        """What changed in each block of a pair.

        Raises:
            UserError: if the file is damaged there.
        """
        entries = max((info.numel for side in SIDES if (info := self.info(side, pair)) is not None), default=0)
        changes = self._changes(pair, entries) if pair.changed else repeat(_NO_CHANGES)
        for start, of_block in zip(range(0, entries, BLOCK), changes, strict=False):
            yield Block(start, min(BLOCK, entries - start), of_block)

    def _changes(self, pair: Pair, entries: int) -> Iterator[Changes]:
        kept, places = (self._tensors.get(f"{pair.name}.{kind}") for kind in ("bits", "indices"))
        if kept is None or places is None:
            raise self.damaged()
        with open(self.path, "rb") as stream:

            def read(info: TensorInfo, start: int, numel: int) -> np.ndarray:
                if start + numel > info.numel:
                    raise self.damaged()
                return read_piece(stream, info, start, numel).numpy()

            coded_at = bits_at = 0
            for start in range(0, entries, BLOCK):
                length = int.from_bytes(read(places, coded_at, 4).tobytes(), "little")
                coded = read(places, coded_at + 4, length)
                coded_at += 4 + length
                try:
                    indices = decode(coded, min(BLOCK, entries - start))
                except ValueError:
                    raise self.damaged() from None
                yield Changes(indices, read(kept, bits_at, len(indices)))
                bits_at += len(indices)

    def changed_tensors(self) -> dict[str, Pair]:
        """The pair of each tensor that changed, by its name in both models; tied ones are there under each name.

        Raises:
            UserError: if a tensor that changed has another shape, or another name or none, in one of the models.
        """
        base, tuned = (self.plan.folder(side).pairs for side in SIDES)
        numbers = {name: number for name, number in base.items() if tuned.get(name) == number}
        in_both = set(numbers.values())
        for number, pair in enumerate(self.plan.pairs):
            before, after = (self.info(side, pair) for side in SIDES)
            shapes = [info.shape for info in (before, after) if info is not None]
            if pair.changed and (number not in in_both or shapes[0] != shapes[-1]):
                raise UserError(
                    f"{self.path} changes the shape of {pair.name}, or whether it is there: `gmt-tune apply` makes the "
                    "whole model's folder with it"
                )
        return {name: self.plan.pairs[number] for name, number in numbers.items() if self.plan.pairs[number].changed}

    def info(self, side: Side, pair: Pair) -> TensorInfo | None:
        """Shape and dtype of a pair's tensor in one of the models; None where that has none."""
        name = pair.of(side)
        return None if name is None else self.plan.folder(side).tensors[name]

    def dtype(self, pair: Pair) -> str:
        """In which the two tensors of a pair are compared."""
        return compared_in(*(self.info(side, pair) for side in SIDES))

    def _unpacked(self, name: str) -> bytes:
        info = self._tensors[name]
        with open(self.path, "rb") as stream:
            try:
                return zlib.decompress(read_piece(stream, info, 0, info.numel).numpy().tobytes())
            except zlib.error:
                raise self.damaged() from None


def common_dtype(first: str, second: str) -> str | None:
    """The dtype of two tensors, or the narrowest that holds all values of both; None if there is none."""
    if first == second:
        return first
    if first not in FLOATS or second not in FLOATS:
        return None
    wide = torch.promote_types(torch_dtype(first), torch_dtype(second))
    return next(name for name in FLOATS if torch_dtype(name) == wide)


def compared_in(*infos: TensorInfo | None) -> str:
    """The dtype in which two tensors are compared, of which one may be missing."""
    present = [info.dtype for info in infos if info is not None]
    dtype = common_dtype(present[0], present[-1])
    assert dtype is not None  # which was seen to when the delta was made
    return dtype


def as_bits(part: torch.Tensor | None, dtype: str, numel: int) -> np.ndarray:
    """The bits of a block's entries.

    Args:
        part: 1-d.
        dtype: safetensors' name of the one that they are compared in.
        numel: entries; those that ``part`` does not have are zeros.

    Returns:
        1-d integers as wide as an entry, which may share memory with ``part``.
    """
    width = torch_dtype(dtype).itemsize
    if part is None:
        return np.zeros(numel, dtype=f"i{width}")
    if dtype in FLOATS:
        part = part.to(torch_dtype(dtype))
    bits = part.view(INT_DTYPES[width]).numpy()
    return bits if len(bits) == numel else np.pad(bits, (0, numel - len(bits)))


class HashingWeights(Weights):
    """Weights that know the digest of each tensor that was read from the first entry to the last.

    Attributes:
        sha256: by the tensor's name.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.sha256: dict[str, str] = {}

    def slices(self, name: str, numel: int) -> Iterator[torch.Tensor]:
        if name in self.sha256:
            yield from super().slices(name, numel)
            return
        sha256 = hashlib.sha256()
        for part in super().slices(name, numel):
            sha256.update(part.view(torch.uint8).numpy().data)
            yield part
        self.sha256[name] = sha256.hexdigest()

    def blocks(self, name: str | None) -> Iterator[torch.Tensor]:
        """The slices of a tensor that a delta codes together; none of a tensor that there is not."""
        return iter(()) if name is None else self.slices(name, BLOCK)
