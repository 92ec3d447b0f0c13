"""Makes a delta of two folders, block by block."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gmt_tune.deltas.file_format import (
    FORMAT,
    SIDES,
    VERSION,
    Folder,
    HashingWeights,
    Pair,
    Plan,
    Watch,
    as_bits,
    common_dtype,
    compared_in,
)
from gmt_tune.deltas.indices import BLOCK, encode
from gmt_tune.errors import UserError, one_line
from gmt_tune.models.origin import read_base
from gmt_tune.reporting.diff import Diff, compare
from gmt_tune.reporting.run_log import written_aside
from gmt_tune.reporting.safetensors_file import encode_header, read_header, torch_dtype

# Of files besides weights, those that are parts of a model; a licence has no suffix. Not data, nor what a run keeps
_OF_A_MODEL = (".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt", "")
_OF_A_RUN = ("training_progress.json",)

_LATEST_OFFSET = 10**15  # takes more digits than those that are written


@dataclass(frozen=True)
class Made:
    """A delta that was written.

    Attributes:
        diff: what changed, as ``gmt-tune diff`` has it.
        changed, entries: how many entries have other bits, and how many the tuned model has.
        size, whole_size: bytes of the delta, and of the tuned model's files with weights.
    """

    diff: Diff
    changed: int
    entries: int
    size: int
    whole_size: int

    def __str__(self) -> str:
        return (
            f"{self.size:,} bytes, {self.size / self.whole_size:.1%} of the weights' {self.whole_size:,}, for "
            f"{self.changed:,} of {self.entries:,} entries"
        )


class LargeDeltaError(UserError):
    """Most entries differ."""


def make_delta(base: Path, tuned: Path, out: Path, *, force: bool = False, watch: Watch = iter) -> Made:
    """Write what turns one model's folder into another's, and back.

    Args:
        base, tuned: folders of safetensors, sharded in any way, or single files.
        out: the file to write; it is there when it is whole.
        force: write it also if most entries differ.
        watch: wraps names of tensors as they are gone through, for a progress bar.

    Raises:
        LargeDeltaError: if most entries differ; a UserError.
        UserError: if a folder cannot be read, or the file cannot be written.
    """
    weights = {"base": HashingWeights(base), "tuned": HashingWeights(tuned)}
    diff = compare(weights["base"], weights["tuned"], watch)
    for each in weights.values():
        for name in each.tensors.keys() - each.sha256.keys():
            for _ in each.blocks(name):
                pass
    pairs, numbers = _paired(**weights)
    files = {side: _other_files(each.path) for side, each in weights.items()}
    own = {
        f"{side}/{name}": content
        for side in SIDES
        for name, content in files[side].items()
        if any(files[other].get(name) != content for other in SIDES)
    }
    folders = {
        side: Folder(
            headers={file.name: read_header(file).decode() for file in sorted(each.files)},
            sha256=each.sha256,
            pairs=numbers[side],
            files={name: hashlib.sha256(content).hexdigest() for name, content in files[side].items()},
        )
        for side, each in weights.items()
    }
    metadata = {"format": FORMAT, "version": VERSION, "base": read_base(base if base.is_dir() else base.parent).name}
    metadata |= {f"{side}_sha256": folder.digest for side, folder in folders.items()}
    differing = {pair.name: number for number, pair in enumerate(pairs) if _differ(pair, **weights)}
    names = [f"{name}.{kind}" for name in differing for kind in ("bits", "indices")]
    try:
        with written_aside(out) as part:
            with open(part, "wb") as stream:
                writer = _Writer(stream, metadata, [*names, *own, "plan.json"])
                for name in watch(list(differing)):
                    pairs[differing[name]] = writer.add_changes(pairs[differing[name]], **weights)
                for name, content in own.items():
                    writer.add(name, zlib.compress(content, 9))
                writer.add("plan.json", zlib.compress(Plan(**folders, pairs=pairs).to_json().encode(), 9))
                size = writer.finish()
            made = Made(
                diff,
                changed=sum(pairs[number].changed for number in numbers["tuned"].values()),
                entries=sum(info.numel for info in weights["tuned"].tensors.values()),
                size=size,
                whole_size=sum(file.stat().st_size for file in weights["tuned"].files),
            )
            if 2 * made.changed > made.entries and not force:
                raise _too_large(made, **weights)
    except OSError as error:
        raise UserError(f"{out} could not be written ({error.strerror or one_line(error)})") from None
    return made


def _too_large(made: Made, base: HashingWeights, tuned: HashingWeights) -> LargeDeltaError:
    dtypes = [{info.dtype for info in each.tensors.values()} for each in (base, tuned)]
    why = ""
    if dtypes[0] != dtypes[1]:
        why = f" ({', '.join(sorted(dtypes[0]))} there, {', '.join(sorted(dtypes[1]))} here: save both in one dtype)"
    return LargeDeltaError(
        f"{made.changed / made.entries:.0%} of the entries of {tuned.path} differ from {base.path}{why}: the delta "
        f"would have {made.size:,} bytes, the whole weights have {made.whole_size:,}"
    )


def _paired(base: HashingWeights, tuned: HashingWeights) -> tuple[list[Pair], dict[str, dict[str, int]]]:
    """The pairs, and by side, which one each tensor belongs to."""
    pairs: list[Pair] = []
    numbers: dict[str, dict[str, int]] = {"base": {}, "tuned": {}}
    known: dict[tuple, int] = {}  # by what both tensors of a pair are, such as those of tied layers

    def same(weights: HashingWeights, name: str) -> tuple:
        info = weights.tensors[name]
        return info.shape, info.dtype, weights.sha256[name]

    for name in (name for name in base.tensors if name in tuned.tensors):
        if common_dtype(base.tensors[name].dtype, tuned.tensors[name].dtype) is None:
            raise UserError(
                f"{name} is {base.tensors[name].dtype} in {base.path} and {tuned.tensors[name].dtype} in "
                f"{tuned.path}, between which there is no delta: save both in one dtype"
            )
        number = known.setdefault((same(base, name), same(tuned, name)), len(pairs))
        if number == len(pairs):
            pairs.append(Pair(name, name))
        numbers["base"][name] = numbers["tuned"][name] = number
    for side, weights in (("base", base), ("tuned", tuned)):
        copied = {same(weights, name): number for name, number in numbers[side].items()}
        for name in weights.tensors:
            if name in numbers[side]:
                continue
            number = copied.setdefault(same(weights, name), len(pairs))
            if number == len(pairs):
                pairs.append(Pair(name, None) if side == "base" else Pair(None, name))
            numbers[side][name] = number
    return pairs, numbers


def _differ(pair: Pair, base: HashingWeights, tuned: HashingWeights) -> bool:
    if pair.base is None or pair.tuned is None:
        return True
    return base.sha256[pair.base] != tuned.sha256[pair.tuned]


def _other_files(path: Path) -> dict[str, bytes]:
    """Of a model's folder, such as its config and tokenizer, by their paths in it."""
    if not path.is_dir():
        return {}
    files = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
    return {
        name.as_posix(): file.read_bytes()
        for name, file in files.items()
        if name.suffix in _OF_A_MODEL
        and name.name not in _OF_A_RUN
        and not any(part.startswith(".") for part in name.parts)
    }


class _Writer:
    """Writes a delta's file from the front to the back; its header, for which it leaves room, at the end.

    Args:
        stream: of the file.
        metadata: for the header.
        names: of all tensors that may come.
    """

    def __init__(self, stream: BinaryIO, metadata: dict[str, str], names: list[str]) -> None:
        self._stream, self._end = stream, 0
        self._entries: dict[str, dict] = {"__metadata__": metadata}
        longest = {"dtype": "I16", "shape": [_LATEST_OFFSET], "data_offsets": [_LATEST_OFFSET, _LATEST_OFFSET]}
        self._room = len(encode_header({**self._entries, **dict.fromkeys(names, longest)}))
        stream.write(b"\0" * (8 + self._room))

    def add(self, name: str, *content: bytes) -> None:
        """Add a tensor of bytes."""
        begin = self._end
        for part in content:
            self._end += self._stream.write(part)
        self._enter(name, "U8", begin)

    def _enter(self, name: str, dtype: str, begin: int) -> None:
        offsets = [begin, self._end]
        shape = [(self._end - begin) // torch_dtype(dtype).itemsize]
        self._entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    def add_changes(self, pair: Pair, base: HashingWeights, tuned: HashingWeights) -> Pair:
        """Add what differs between the two tensors of a pair; returns the pair with what is known of it then."""
        infos = [weights.tensors.get(name) for name, weights in ((pair.base, base), (pair.tuned, tuned)) if name]
        dtype, entries = compared_in(*infos), max(info.numel for info in infos if info is not None)
        old_parts, new_parts = base.blocks(pair.base), tuned.blocks(pair.tuned)
        coded: list[bytes] = []
        old_crc32 = new_crc32 = changed = 0
        begin = self._end
        for start in range(0, entries, BLOCK):
            numel = min(BLOCK, entries - start)
            old, new = (as_bits(next(parts, None), dtype, numel) for parts in (old_parts, new_parts))
            bits = old ^ new
            indices = np.flatnonzero(bits)
            self._end += self._stream.write(bits[indices])
            block = encode(indices, numel).tobytes()
            coded += [len(block).to_bytes(4, "little"), block]
            old_crc32 = zlib.crc32(old[indices].data, old_crc32)
            new_crc32 = zlib.crc32(new[indices].data, new_crc32)
            changed += len(indices)
        if not changed:
            return pair
        self._enter(f"{pair.name}.bits", f"I{8 * torch_dtype(dtype).itemsize}", begin)
        # Up to a multiple of 8 bytes, so that the next bits are aligned
        length = sum(map(len, coded))
        self.add(f"{pair.name}.indices", *coded, b"\0" * (-(self._end + length) % 8))
        return replace(pair, changed=changed, crc32=(old_crc32, new_crc32))

    def finish(self) -> int:
        """Write the header; returns the bytes of the file."""
        self._stream.seek(0)
        self._stream.write(self._room.to_bytes(8, "little") + encode_header(self._entries).ljust(self._room))
        return 8 + self._room + self._end
