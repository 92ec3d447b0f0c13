"""A checkpoint's manifest: what the run says of itself, and the size and checksum of every file beside it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_origin, get_type_hints

from gmt_tune.integrations.torchtune.checkpoint.exchange import Position
from gmt_tune.models.origin import CARD, read_json_object
from gmt_tune.reporting.run_log import flush

MANIFEST = "training_progress.json"

# Of what a checkpoint holds; the one before kept each rank's state in a file of its own
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Progress(Position):
    """What a checkpoint's manifest says of the run that saved it.

    Attributes:
        world_size: how many ranks saved it.
        rows_of_a_step: that all ranks together saw in one optimizer step.
        dataset_rows: length of the training set.
        config: without secrets.
        environment: checks of what the config takes from the environment.
        model_files: names of the files with the weights.
    """

    world_size: int
    rows_of_a_step: int
    dataset_rows: int
    config: dict
    model_files: list[str]
    environment: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a manifest.

    Attributes:
        path: the folder.
        progress: what the run said of itself when it saved.
        files: file name (relative, POSIX) to [bytes, crc32].
        format: :data:`FORMAT` of the version that saved it.
    """

    path: Path
    progress: Progress
    files: dict[str, list[int]]
    format: int

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.progress.global_step

    @property
    def val_loss(self) -> float:
        """Validation loss when it was saved; infinity where there was no validation, or it was not finite."""
        value = self.progress.val_loss
        return value if isinstance(value, (int, float)) and math.isfinite(value) else math.inf

    def damage(self) -> str | None:
        """What is wrong with its files, in words, or None. Reads every byte, but of its model card."""
        for name, (size, checksum) in self.files.items():
            if name == CARD:
                continue
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


def write_manifest(folder: Path, progress: Progress) -> None:
    """Complete a folder in which all else is written, and flush it to disk.

    All files get the mode of a new file, as umask says: safetensors makes files that only their owner can read.
    """
    manifest = folder / MANIFEST
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest.touch()
    files = {}
    for file in written:
        with contextlib.suppress(OSError):  # not every file system has modes
            shutil.copymode(manifest, file)
        files[file.relative_to(folder).as_posix()] = _size_and_crc32(file)
        flush(file)
    content = {"format": FORMAT, "progress": asdict(progress), "files": files}
    content = json.loads(json.dumps(content))  # as it will be read
    manifest.write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1))
    flush(manifest)
    for directory, _, _ in os.walk(folder):
        flush(Path(directory))


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """What a manifest holds; None where it is missing or not as it was written."""
    manifest = read_json_object(folder / MANIFEST) or {}
    try:
        is_as_written = manifest.pop("checksum", None) == _checksum(manifest)
    except RecursionError:
        return None
    progress, files = _progress(manifest.get("progress")), manifest.get("files")
    if not is_as_written or progress is None or not isinstance(files, dict):
        return None
    if not all(isinstance(entry, list) and [type(n) for n in entry] == [int, int] for entry in files.values()):
        return None
    has_model = all(isinstance(name, str) and name in files for name in progress.model_files)
    return Checkpoint(folder, progress, files, manifest.get("format", 1)) if has_model else None


def _progress(saved: object) -> Progress | None:
    """A manifest's progress; None if a value is missing or not of its type. What it does not know, it leaves out."""
    kinds = get_type_hints(Progress)
    try:
        progress = Progress(**{key: value for key, value in dict(saved).items() if key in kinds})  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return None
    for key, kind in kinds.items():
        value = getattr(progress, key)
        if kind in (int, bool, dict, list[str]) and type(value) is not (get_origin(kind) or kind):  # True is no number
            return None
        if kind is int and value < (key == "world_size"):
            return None
    return progress


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _size_and_crc32(file: Path) -> list[int]:
    """Of what is read: a network file system may show an old size of a file that another node has written."""
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]
