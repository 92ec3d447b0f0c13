"""Checkpoint folders that are whole or not there: written aside, flushed to disk, checked, then renamed.

A folder with a final name (``step_40``, ``epoch_0``) holds a manifest with the size and checksum of every
file in it, written last. Whatever interrupts a save leaves only a folder whose name begins with
``.incomplete-``, which the next run removes. Knows files alone, nothing of models.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from gmt_tune.integrations.torchtune.checkpoint.manifest import (
    MANIFEST,
    Checkpoint,
    Progress,
    read_checkpoint,
    write_manifest,
)
from gmt_tune.reporting.run_log import flush

_INCOMPLETE = ".incomplete-"
_FINAL_NAME = re.compile(r"(step|epoch)_\d+")


def list_checkpoints(output_dir: Path, report: Callable[[str], None] = lambda sentence: None) -> list[Checkpoint]:
    """Every folder with a final name and a readable manifest, the newest (by step) first; the others are reported."""
    found = []
    for folder in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        if _FINAL_NAME.fullmatch(folder.name):
            if (checkpoint := read_checkpoint(folder)) is not None:
                found.append(checkpoint)
            else:
                report(f"{folder} is passed over: its {MANIFEST} is missing or damaged")
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def newest_whole(output_dir: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are all as they were written; damaged ones before it are reported."""
    for checkpoint in list_checkpoints(output_dir, report):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint
        report(f"the checkpoint {checkpoint.path} is damaged ({damage}): using the one before it")
    return None


def set_damaged_aside(output_dir: Path, newer_than: Checkpoint | None) -> list[Path]:
    """Rename the checkpoints before the one that :func:`newest_whole` gave, so that none counts among the newest.

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
    names = itertools.chain([name], (name.with_name(f"{name.name}_{number}") for number in itertools.count(2)))
    return path.rename(next(name for name in names if not os.path.lexists(name)))


def remove(path: Path) -> None:
    """Delete a folder, a file or a link, if it is there; of a link, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def incomplete_path(output_dir: Path, name: str) -> Path:
    """Where the checkpoint ``name`` is to be written before it is whole."""
    return output_dir / f"{_INCOMPLETE}{name}"


def by_final_name(message: str) -> str:
    """A message whose paths are in the folder of :func:`incomplete_path`, with the name that users know."""
    return message.replace(_INCOMPLETE, "")


def make_incomplete(folder: Path) -> None:
    """Make the folder of :func:`incomplete_path`, empty."""
    remove(folder)
    folder.mkdir(parents=True)


def complete(folder: Path, name: str, progress: Progress) -> tuple[Path, Path | None]:
    """Give a written folder its final name: write the manifest, flush everything to disk, rename.

    Returns:
        The final path, and where whatever had that name before is now, or None.
    """
    write_manifest(folder, progress)
    final = folder.parent / name
    # Not this run's: the user's own, or a checkpoint whose manifest is damaged
    aside = set_aside(final, "earlier") if os.path.lexists(final) else None
    folder.rename(final)
    flush(final.parent)
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
    """Move all that has a checkpoint's name into a folder ``previous_N``; None where there was nothing to move."""
    found = [path for path in sorted(output_dir.glob("*")) if _FINAL_NAME.fullmatch(path.name)]
    if not found:
        return None
    names = (output_dir / f"previous_{number}" for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
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
    found = [checkpoint for checkpoint in list_checkpoints(output_dir) if checkpoint.val_loss < math.inf]
    return min(found, key=lambda checkpoint: (checkpoint.val_loss, checkpoint.step), default=None)


def mark_best(output_dir: Path) -> None:
    """Name the best checkpoint in ``best_checkpoint.json``, for people and their scripts; nothing here needs it."""
    checkpoint = best(output_dir)
    if checkpoint is None:
        return
    file = output_dir / f"{_INCOMPLETE}{MARK_OF_BEST}"
    file.write_text(json.dumps({"folder": checkpoint.path.name, "val_loss": checkpoint.val_loss}))
    flush(file)
    file.replace(output_dir / MARK_OF_BEST)
