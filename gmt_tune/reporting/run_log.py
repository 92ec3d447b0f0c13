"""The run log: two small files beside the checkpoints, from which ``gmt-tune report`` draws.

``run_log.jsonl`` holds one JSON object per line: first the run's header, then ``{"step", "time", **numbers}`` for
each call of :meth:`RunLog.log`. ``mask_detail.jsonl`` holds numbers of every masked parameter, at fewer and fewer
steps as the run gets longer. Both are appended to line by line, so that a killed run loses at most its last line.
Standard library only; how they are read is in ``run_reader``.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gmt_tune.reporting.redaction import without_secrets

__all__ = ["RunLog"]

RUN_LOG_FILE = "run_log.jsonl"
MASK_DETAIL_FILE = "mask_detail.jsonl"
FORMAT = "gmt-tune run log"
FORMAT_VERSION = 1

# After the first steps, detail is written when the step has grown by one part in this many.
_DETAIL_RATE = 32

log = logging.getLogger(__name__)


class RunLog:
    """Writes a run's numbers to its output folder. Only one rank should have one.

    Call :meth:`truncate_after` once before the first step, with the step that the run starts from. A folder that cannot
    be written to costs the log, not the run: that is warned about once.

    Args:
        output_dir: the run's folder.
        config: the run's configuration as plain dicts and lists, which goes into the header, with
            passwords and keys blanked.
    """

    def __init__(self, output_dir: str | os.PathLike, config: Mapping | None = None) -> None:
        self._folder = Path(output_dir)
        self._config = without_secrets(config or {})
        self._base: str | None = None  # the model that the run began from, where it was resumed
        self._last_detail: int | None = None
        self._is_broken = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line. A name may come again at the same step in another call; the last value counts.

        Args:
            step: optimizer steps done.
            metrics: name to number, anything that ``float`` takes.
        """
        line = {"step": int(step), "time": round(time.time(), 3)}
        self._append(RUN_LOG_FILE, line | {name: _json_number(value) for name, value in metrics.items()})

    def log_mask(
        self, step: int, make_detail: Callable[[], Mapping[str, Mapping[str, float]]]
    ) -> Mapping[str, Mapping[str, float]]:
        """Append the numbers of every masked parameter, where that is due: always at first, later seldom.

        Args:
            step: optimizer steps done.
            make_detail: called where it is due, as that waits for the device; gives kind to parameter to number.

        Returns:
            What was written, empty if nothing was.
        """
        if self._last_detail is not None and step - self._last_detail < max(1, step // _DETAIL_RATE):
            return {}
        detail = make_detail()
        if not any(detail.values()):
            return {}
        line = {kind: {n: _json_number(v, digits=6) for n, v in numbers.items()} for kind, numbers in detail.items()}
        self._append(MASK_DETAIL_FILE, {"step": int(step), **line})
        self._last_detail = step
        return detail

    def truncate_after(self, step: int) -> None:
        """Go on from a step, 0 for a new run: keep what was logged until then, under this run's header."""
        for name in (RUN_LOG_FILE, MASK_DETAIL_FILE):
            path = self._folder / name
            lines = self._guarded(read_lines, path) if step > 0 else []
            if lines is None:  # it cannot be read, and is not replaced by less
                continue
            kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
            if name == RUN_LOG_FILE:
                self._base = base_in(next((line for line in lines if line.get("format") == FORMAT), {}))
            else:
                self._last_detail = kept[-1]["step"] if kept else None
            self._guarded(write_whole, path, b"".join(map(_dumps, [self._header_of(name), *kept])))

    def _append(self, name: str, line: dict) -> None:
        path = self._folder / name
        if not path.exists():
            self._guarded(write_whole, path, _dumps(self._header_of(name)))
        self._guarded(_append_line, path, line)

    def _header_of(self, name: str) -> dict:
        header = {"format": FORMAT, "version": FORMAT_VERSION, "file": name, "time": round(time.time(), 3)}
        if name != RUN_LOG_FILE:
            return header
        return {**header, "config": self._config} | ({"base": self._base} if self._base is not None else {})

    def _guarded(self, action: Callable, path: Path, *content):
        try:
            return action(path, *content)
        except OSError as error:
            if not self._is_broken:
                log.warning("The run log %s cannot be written (%s): the run goes on without it.", path, error)
            self._is_broken = True
            return None


def base_in(header: Mapping) -> str | None:
    """The model that a run began from, by the header of its log: a resumed one's config names a checkpoint."""
    base = header.get("base")
    for key in ("config", "checkpointer", "checkpoint_dir"):
        header = header.get(key) if isinstance(header, Mapping) else None
    found = header if base is None else base
    return found if isinstance(found, str) else None


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, one per line; lines that are none (such as a torn last one) are left out.

    What is no file reads as empty. NaN and infinity are the strings that ``float`` takes.
    """
    lines = []
    for raw in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):  # the latter for deep nesting
            lines.append(json.loads(raw))
    return [line for line in lines if isinstance(line, dict)]


def _json_number(value, digits: int | None = None) -> float | int | str:
    """A number as strict JSON knows it; NaN and infinity, which it does not know, as strings."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # its names for them
    return float(f"{value:.{digits}g}") if digits else value


def _dumps(line: dict) -> bytes:
    return (json.dumps(line, separators=(",", ":"), default=str) + "\n").encode()


def _append_line(path: Path, line: dict) -> None:
    """One write to a file opened for appending: a line is there whole, or torn only at the file's end."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)  # as umask says
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # the last writer was killed in mid-line
        os.write(file, (b"\n" if torn else b"") + _dumps(line))
    finally:
        os.close(file)


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one go: a reader, or a run killed meanwhile, finds the old one or the new one."""
    with written_aside(path) as part:
        part.write_bytes(content)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of ``path``, flushed to disk, if the block ends without an error."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        flush(part)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # also where the folder is none
            part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
