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
from collections.abc import Iterator
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
            if _crc32(file) != checksum:
                return f"the checksum of {name} is wrong"
        return None


def list_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Every folder with a final name and a readable manifest, the newest (by step) first."""
    found = []
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        if _FINAL_NAME.fullmatch(folder.name):
            manifest = _read_manifest(folder)
            if manifest is not None:
                found.append(Checkpoint(folder, manifest["progress"], manifest["files"]))
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def newest_whole(output_dir: Path, report) -> Checkpoint | None:
    """The newest checkpoint whose files are all as they were written.

    Args:
        output_dir: the run's folder.
        report: called with one sentence for each damaged checkpoint that is passed over.
    """
    for checkpoint in list_checkpoints(output_dir):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint
        report(f"the checkpoint {checkpoint.path} is damaged ({damage}): using the one before it")
    return None


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
        files[file.relative_to(folder).as_posix()] = [file.stat().st_size, _crc32(file)]
        _fsync(file)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"progress": progress, "files": files}, indent=1))
    _fsync(manifest)
    for directory in [d for d, _, _ in os.walk(folder)]:
        _fsync(Path(directory))
    final = folder.parent / name
    if final.exists():
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
    """Name and validation loss of the best checkpoint; (None, infinity) where none is marked."""
    try:
        marked = json.loads((output_dir / MARK_OF_BEST).read_text())
        return marked["folder"], marked["val_loss"]
    except (OSError, ValueError, KeyError):
        return None, float("inf")


def check_space(output_dir: Path, needed: int, key: str = "output_dir") -> None:
    """Raise UserError if the disk of a folder has fewer than ``needed`` bytes left."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"{key} {output_dir} has {free / 2**30:.2f} GiB free, but the checkpoints need about "
            f"{needed / 2**30:.2f} GiB: free space, choose another {key}, or lower keep_last_n_checkpoints"
        )


def _read_manifest(folder: Path) -> dict | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest if isinstance(manifest["progress"]["global_step"], int) and manifest["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
