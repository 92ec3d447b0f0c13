"""Turns the folder of one of a delta's two models into that of the other, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from gmt_tune.deltas.file_format import Delta, Side, Watch
from gmt_tune.deltas.source import Source
from gmt_tune.errors import UserError, one_line
from gmt_tune.reporting.run_log import flush
from gmt_tune.reporting.safetensors_file import torch_dtype, write_file

# A model does without these
_FOR_PEOPLE = (".md", "LICENSE", "NOTICE", "LICENSE.txt", "NOTICE.txt")


def rebuild(source: Path, delta: Delta, out: Path, *, remove: bool = False, watch: Watch = iter) -> list[str]:
    """Write the folder of the tuned model from the base's, or the base's from the tuned one's.

    Args:
        source: folder of the base; of the tuned model, with ``remove``.
        delta: between the two.
        out: folder to make, which is there when it is whole.
        remove: take the delta back.
        watch: wraps names of tensors as they are gone through, for a progress bar.

    Returns:
        Names of files for people, such as a licence, that ``source`` does not have as they were: they are left out.

    Raises:
        UserError: if ``source`` is not that model, a file is damaged, or ``out`` cannot be written.
    """
    side: Side = "tuned" if remove else "base"
    target: Side = "base" if remove else "tuned"
    model = Source(source, delta, side)
    with folder_aside(out) as part:
        left_out = _copy_files(model, delta, target, part)
        headers = delta.plan.folder(target).headers
        files = {file: _in_order(header) for file, header in headers.items()}
        names = iter(watch([name for of_file in files.values() for name in of_file]))
        for file, of_file in files.items():
            pieces = (piece for name in islice(names, len(of_file)) for piece in _tensor(model, delta, target, name))
            write_file(part / file, headers[file].encode(), pieces)
    return left_out


@contextlib.contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out``, flushed to disk, at the block's end, if that is reached.

    Raises:
        UserError: if ``out`` is there and not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name a folder that does not, or delete it")
    part = out.parent / f".incomplete-{out.name}"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for path in (*part.rglob("*"), part):
            flush(path)
        if out.is_dir():
            out.rmdir()
        part.rename(out)
        flush(out.parent)
    except OSError as error:
        raise UserError(f"{out} could not be written ({error.strerror or one_line(error)})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _copy_files(model: Source, delta: Delta, target: Side, folder: Path) -> list[str]:
    """Write all but the weights; returns the names of those that are left out."""
    left_out = []
    for name, sha256 in delta.plan.folder(target).files.items():
        content = delta.file(target, name)
        if content is None:
            file = model.path / name
            content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() == sha256:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        elif name.endswith(_FOR_PEOPLE):
            left_out.append(name)
        else:
            raise model.is_another(f"its {name} is missing or another one")
    return left_out


def _tensor(model: Source, delta: Delta, target: Side, name: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor, in pieces."""
    folder = delta.plan.folder(target)
    pair, sha256 = delta.plan.pairs[folder.pairs[name]], hashlib.sha256()
    info, dtype = delta.info(target, pair), delta.dtype(pair)
    assert info is not None
    for entries, (start, _, (indices, bits)) in model.blocks(pair):
        entries[indices] ^= bits
        piece = entries[: max(0, info.numel - start)]
        if dtype != info.dtype:
            cast = torch.from_numpy(piece).view(torch_dtype(dtype)).to(torch_dtype(info.dtype))
            piece = cast.view(torch.uint8).numpy()
        sha256.update(piece.data)
        yield piece
    if sha256.hexdigest() != folder.sha256[name]:
        raise delta.damaged()


def _in_order(header: str) -> list[str]:
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    return sorted(entries, key=lambda name: entries[name]["data_offsets"])
