"""Checkpoint folders that are whole or not there: written aside, flushed to disk, checked, then renamed.

A folder with a final name (``step_40``, ``epoch_0``) holds a manifest with the size and checksum of every
file in it, written last. Whatever interrupts a save leaves only a folder whose name begins with
``.incomplete-``, which the next run removes. Knows files alone, nothing of models.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gmt_tune.errors import UserError

MANIFEST = "training_progress.json"
_INCOMPLETE = ".incomplete-"
_FINAL_NAME = re.compile(r"(step|epoch)_\d+")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a manifest.

    Attributes:
        path: the folder.
        progress: what the run said of itself when it saved, such as ``global_step``.
        files: file name (relative, POSIX) to [bytes, crc32].
    """

    path: Path
    progress: dict
    files: dict[str, list[int]]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.progress["global_step"]

    def damage(self) -> str | None:
        """What is wrong with its files, in words, or None. Reads every byte."""
        for name, (size, checksum) in self.files.items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if _size_and_crc32(file)[1] != checksum:
                return f"the checksum of {name} is wrong"
        return None


def list_checkpoints(output_dir: Path, report: Callable[[str], None] = lambda sentence: None) -> list[Checkpoint]:
    """Every folder with a final name and a readable manifest, the newest (by step) first.

    Args:
        output_dir: the run's folder.
        report: called with one sentence for each folder with a final name whose manifest cannot be read.
    """
    found = []
    for folder in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        if _FINAL_NAME.fullmatch(folder.name):
            manifest = _read_manifest(folder)
            if manifest is not None:
                found.append(Checkpoint(folder, manifest["progress"], manifest["files"]))
            else:
                report(f"{folder} is passed over: its {MANIFEST} is missing or damaged")
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def newest_whole(output_dir: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are all as they were written.

    Args:
        output_dir: the run's folder.
        report: called with one sentence for each damaged checkpoint that is passed over.
    """
    for checkpoint in list_checkpoints(output_dir, report):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint
        report(f"the checkpoint {checkpoint.path} is damaged ({damage}): using the one before it")
    return None


def set_damaged_aside(output_dir: Path, newer_than: Checkpoint) -> list[Path]:
    """Rename the damaged checkpoints that a run did not go on from, so that none counts among the newest.

    Args:
        output_dir: the run's folder.
        newer_than: what :func:`newest_whole` gave: those before it in its order are damaged.

    Returns:
        Their new paths, such as ``damaged_step_40``.
    """
    aside = []
    for checkpoint in list_checkpoints(output_dir):
        if checkpoint.path == newer_than.path:
            break
        path = output_dir / f"damaged_{checkpoint.path.name}"
        if path.exists():
            shutil.rmtree(path)
        aside.append(checkpoint.path.rename(path))
    return aside


def incomplete_path(output_dir: Path, name: str) -> Path:
    """Where the checkpoint ``name`` is to be written before it is whole."""
    return output_dir / f"{_INCOMPLETE}{name}"


def make_incomplete(folder: Path) -> None:
    """Make the folder of :func:`incomplete_path`, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def complete(folder: Path, name: str, progress: dict) -> Path:
    """Give a written folder its final name: write the manifest, flush everything to disk, rename.

    Args:
        folder: of :func:`incomplete_path`, with all files written.
        name: final name.
        progress: for the manifest; plain JSON values, among them ``global_step``.

    Returns:
        The final path. A folder of that name that was there before is replaced.
    """
    files = {}
    for file in _files(folder):
        files[file.relative_to(folder).as_posix()] = _size_and_crc32(file)
        _fsync(file)
    manifest = folder / MANIFEST
    content = json.loads(json.dumps({"progress": progress, "files": files}))  # as it will be read
    manifest.write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1))
    _fsync(manifest)
    for directory in [d for d, _, _ in os.walk(folder)]:
        _fsync(Path(directory))
    final = folder.parent / name
    if final.exists():  # a damaged one, behind which the run went on from an earlier one
        discard(final)
    folder.rename(final)
    _fsync(final.parent)
    return final


def discard(folder: Path) -> None:
    """Remove a checkpoint so that no half of it keeps its final name."""
    doomed = folder.parent / f"{_INCOMPLETE}discarded-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_incomplete(output_dir: Path) -> None:
    """Remove what interrupted saves left behind."""
    for folder in output_dir.glob(f"{_INCOMPLETE}*"):
        shutil.rmtree(folder, ignore_errors=True)


def keep_newest(output_dir: Path, count: int, keep: str | None = None) -> None:
    """Discard all but the newest ``count`` checkpoints and the one named ``keep``."""
    for checkpoint in list_checkpoints(output_dir)[count:]:
        if checkpoint.path.name != keep:
            discard(checkpoint.path)


def move_aside(output_dir: Path) -> Path | None:
    """Move the checkpoints of an earlier run into a folder of their own, so that none is overwritten.

    Returns:
        That folder, ``previous_N``, or None where there was nothing to move.
    """
    names = [MARK_OF_BEST, "run_log.jsonl", "mask_detail.jsonl"]
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        return None
    number = 1
    while (output_dir / f"previous_{number}").exists():
        number += 1
    aside = output_dir / f"previous_{number}"
    aside.mkdir()
    for path in [c.path for c in checkpoints] + [output_dir / n for n in names if (output_dir / n).exists()]:
        path.rename(aside / path.name)
    return aside


MARK_OF_BEST = "best_checkpoint.json"


def mark_best(output_dir: Path, name: str, val_loss: float) -> None:
    """Note which checkpoint has the lowest validation loss, in ``best_checkpoint.json``."""
    file = output_dir / f"{_INCOMPLETE}{MARK_OF_BEST}"
    file.write_text(json.dumps({"folder": name, "val_loss": val_loss}))
    _fsync(file)
    file.replace(output_dir / MARK_OF_BEST)


def best(output_dir: Path) -> tuple[str | None, float]:
    """Name and validation loss of the best checkpoint; (None, infinity) where none is marked or it is gone."""
    try:
        marked = json.loads((output_dir / MARK_OF_BEST).read_text())
        if (output_dir / marked["folder"]).is_dir():
            return marked["folder"], marked["val_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None, float("inf")


def space_needed(weights: int, state: int, saves: int, keep_last_n: int | None, there: int = 0) -> int:
    """Bytes that the checkpoints to come add to the disk at the least, while there are most of them.

    Args:
        weights: bytes of one checkpoint's model.
        state: bytes that a checkpoint which is not the last one holds besides.
        saves: how many such checkpoints will be written before the last one.
        keep_last_n: as ``keep_last_n_checkpoints``; a new checkpoint is whole before the oldest is discarded.
        there: bytes of the checkpoints that there are already; they count against it where they will be discarded.
    """
    if keep_last_n is None:
        return saves * (weights + state) + weights
    whole = weights + state
    in_between = min(saves, keep_last_n + 1) * whole
    at_the_end = min(saves, keep_last_n) * whole + weights
    return max(in_between, at_the_end) - there


def check_space(output_dir: Path, needed: int) -> None:
    """Raise UserError if the disk of a folder has fewer than ``needed`` bytes left."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"output_dir {output_dir} has {free / 2**30:.2f} GiB free, but the checkpoints need about "
            f"{needed / 2**30:.2f} GiB: free space, choose another output_dir, or lower keep_last_n_checkpoints"
        )


def _read_manifest(folder: Path) -> dict | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        checksum = manifest.pop("checksum")
        return manifest if checksum == _checksum(manifest) else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _size_and_crc32(file: Path) -> list[int]:
    """Of what is read: a network file system may show an old size of a file that another node has written."""
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
