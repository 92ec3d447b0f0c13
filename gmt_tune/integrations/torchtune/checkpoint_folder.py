"""Checkpoint folders that are whole or not there: written aside, flushed to disk, checked, then renamed.

A folder with a final name (``step_40``, ``epoch_0``) holds a manifest with the size and checksum of every
file in it, written last. Whatever interrupts a save leaves only a folder whose name begins with
``.incomplete-``, which the next run removes. Knows files alone, nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from gmt_tune.errors import UserError

MANIFEST = "training_progress.json"
_INCOMPLETE = ".incomplete-"
_FINAL_NAME = re.compile(r"(step|epoch)_\d+")

# What a manifest must say of the run, and the types that the values may have: a manifest without it is damaged.
_PROGRESS = {
    "global_step": int, "epoch": int, "samples": int, "steps_in_epoch": int, "rows_of_a_step": int,
    "steps_per_epoch": int, "dataset_rows": int, "total_epochs": int, "skipped_steps": int, "world_size": int,
    "seed": int, "is_final": bool, "config": dict, "model_files": list,
}  # fmt: skip


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

    @property
    def val_loss(self) -> float:
        """Validation loss when it was saved; infinity where there was no validation."""
        value = self.progress.get("val_loss")
        return value if isinstance(value, (int, float)) and math.isfinite(value) else math.inf

    def damage(self) -> str | None:
        """What is wrong with its files, in words, or None. Reads every byte."""
        for name, (size, checksum) in self.files.items():
            file = self.path / name
            try:
                if not file.is_file():
                    return f"{name} is missing"
                if file.stat().st_size != size:
                    return f"{name} has {file.stat().st_size} bytes instead of {size}"
                if _size_and_crc32(file)[1] != checksum:
                    return f"the checksum of {name} is wrong"
            except OSError as error:  # such as EIO from a failing disk
                return f"{name} cannot be read: {error.strerror or error}"
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


def set_damaged_aside(output_dir: Path, newer_than: Checkpoint | None) -> list[Path]:
    """Rename the damaged checkpoints that a run did not go on from, so that none counts among the newest.

    Args:
        output_dir: the run's folder.
        newer_than: what :func:`newest_whole` gave: those before it in its order are damaged; None if all are.

    Returns:
        Their new paths, such as ``damaged_step_40``.
    """
    aside = []
    for checkpoint in list_checkpoints(output_dir):
        if newer_than is not None and checkpoint.path == newer_than.path:
            break
        with contextlib.suppress(OSError):  # of a failing disk
            aside.append(set_aside(checkpoint.path, "damaged"))
    return aside


def set_aside(path: Path, word: str) -> Path:
    """Rename a file or folder to a free name such as ``damaged_step_40`` or ``damaged_step_40_2``; returns it."""
    name = path.parent / f"{word}_{path.name}"
    number = 2
    while os.path.lexists(name):
        name = path.parent / f"{word}_{path.name}_{number}"
        number += 1
    return path.rename(name)


def remove(path: Path) -> None:
    """Delete a folder, a file or a link, if it is there; of a link, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def incomplete_path(output_dir: Path, name: str) -> Path:
    """Where the checkpoint ``name`` is to be written before it is whole."""
    return output_dir / f"{_INCOMPLETE}{name}"


def make_incomplete(folder: Path) -> None:
    """Make the folder of :func:`incomplete_path`, empty."""
    remove(folder)
    folder.mkdir(parents=True)


def complete(folder: Path, name: str, progress: dict) -> tuple[Path, Path | None]:
    """Give a written folder its final name: write the manifest, flush everything to disk, rename.

    All files get the mode of a new file, as umask says: safetensors makes files that only their owner can read.

    Args:
        folder: of :func:`incomplete_path`, with all files written.
        name: final name.
        progress: for the manifest; plain JSON values, among them ``global_step``.

    Returns:
        The final path, and where whatever had that name before is now, or None.
    """
    manifest = folder / MANIFEST
    files = {}
    written = list(_files(folder))
    manifest.touch()
    for file in written:
        with contextlib.suppress(OSError):  # not every file system has modes
            shutil.copymode(manifest, file)
        files[file.relative_to(folder).as_posix()] = _size_and_crc32(file)
        _fsync(file)
    content = json.loads(json.dumps({"progress": progress, "files": files}))  # as it will be read
    manifest.write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1))
    _fsync(manifest)
    for directory in [d for d, _, _ in os.walk(folder)]:
        _fsync(Path(directory))
    final = folder.parent / name
    # Not this run's: the user's own, or a checkpoint whose manifest is damaged
    aside = set_aside(final, "earlier") if os.path.lexists(final) else None
    folder.rename(final)
    _fsync(final.parent)
    return final, aside


def discard(folder: Path) -> None:
    """Remove a checkpoint so that no half of it keeps its final name."""
    doomed = folder.parent / f"{_INCOMPLETE}discarded-{folder.name}"
    remove(doomed)
    folder.rename(doomed)
    remove(doomed)


def remove_incomplete(output_dir: Path) -> None:
    """Remove what interrupted saves left behind."""
    for path in output_dir.glob(f"{_INCOMPLETE}*"):
        with contextlib.suppress(OSError):
            remove(path)


def keep_newest(output_dir: Path, count: int, keep: Collection[str] = ()) -> None:
    """Discard all but the newest ``count`` checkpoints and those whose names are in ``keep``."""
    for checkpoint in list_checkpoints(output_dir)[count:]:
        if checkpoint.path.name not in keep:
            discard(checkpoint.path)


def move_aside(output_dir: Path) -> Path | None:
    """Move what a new run would write over into a folder of its own: all that has a checkpoint's name.

    Returns:
        That folder, ``previous_N``, or None where there was nothing to move.
    """
    found = [path for path in sorted(output_dir.glob("*")) if _FINAL_NAME.fullmatch(path.name)]
    if not found:
        return None
    number = 1
    while os.path.lexists(output_dir / f"previous_{number}"):
        number += 1
    aside = output_dir / f"previous_{number}"
    aside.mkdir()
    for path in found + [output_dir / name for name in _FILES_OF_A_RUN if (output_dir / name).exists()]:
        path.rename(aside / path.name)
    return aside


def is_the_runs(name: str) -> bool:
    """Whether a run moves, replaces or deletes what has this name in its ``output_dir``."""
    return bool(_FINAL_NAME.fullmatch(name)) or name.startswith(_INCOMPLETE) or name in _FILES_OF_A_RUN


MARK_OF_BEST = "best_checkpoint.json"
_FILES_OF_A_RUN = (MARK_OF_BEST, "run_log.jsonl", "mask_detail.jsonl")


def best(output_dir: Path) -> Checkpoint | None:
    """The checkpoint with the lowest validation loss, the earliest of several; None without validation."""
    checkpoints = list_checkpoints(output_dir)
    # Manifests of earlier versions do not hold the loss: for those, the mark does
    marked = read_json_object(output_dir / MARK_OF_BEST) or {}
    for checkpoint in checkpoints:
        if checkpoint.path.name == marked.get("folder"):
            checkpoint.progress.setdefault("val_loss", marked.get("val_loss"))
    found = [checkpoint for checkpoint in checkpoints if checkpoint.val_loss < math.inf]
    return min(found, key=lambda checkpoint: (checkpoint.val_loss, checkpoint.step), default=None)


def mark_best(output_dir: Path) -> None:
    """Name the best checkpoint in ``best_checkpoint.json``, for people and their scripts; nothing here needs it."""
    checkpoint = best(output_dir)
    if checkpoint is None:
        return
    file = output_dir / f"{_INCOMPLETE}{MARK_OF_BEST}"
    file.write_text(json.dumps({"folder": checkpoint.path.name, "val_loss": checkpoint.val_loss}))
    _fsync(file)
    file.replace(output_dir / MARK_OF_BEST)


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
    """What a manifest holds; None where it is missing or not as it was written."""
    manifest = read_json_object(folder / MANIFEST) or {}
    try:
        if manifest.pop("checksum", None) != _checksum(manifest):
            return None
    except RecursionError:
        return None
    progress, files = manifest.get("progress"), manifest.get("files")
    if not isinstance(progress, dict) or not isinstance(files, dict):
        return None
    if not all(type(progress.get(key)) is kind for key, kind in _PROGRESS.items()):  # True is no number
        return None
    if any(progress[key] < (key == "world_size") for key, kind in _PROGRESS.items() if kind is int):
        return None
    if not all(isinstance(entry, list) and [type(n) for n in entry] == [int, int] for entry in files.values()):
        return None
    return manifest if all(isinstance(name, str) and name in files for name in progress["model_files"]) else None


def read_json_object(file: Path) -> dict | None:
    """The JSON object in a file; None for anything else, such as a list, a pipe, or brackets without end."""
    try:
        if not file.is_file():  # reading from a pipe would wait for who writes to it
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


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
