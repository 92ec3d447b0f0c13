"""Which files that a config names lie in its own ``output_dir``, where a run moves, replaces and deletes folders."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

_NAMES_OF_PARAMETERS = "gradient_mask"  # its patterns are of parameters, not of files


def inputs_in(config, output_dir: Path) -> dict[str, str]:
    """Names in ``output_dir`` that paths of a config lead into, with the first key that does and its value.

    Files are looked at one by one only where they may lie in ``output_dir``: a data set may have very many.

    Args:
        config: as plain dicts and lists.
        output_dir: exists.
    """
    outputs = _spellings(str(output_dir))
    found: dict[str, str] = {}
    for key, text, folder in _texts(config):
        for name in _names_on_the_way(text, folder, outputs):
            found.setdefault(name, f"{key} ({text})")
    return found


def _texts(config, prefix: str = "", folder: str | None = None) -> Iterator[tuple[str, str, str | None]]:
    """Every text of a config: its key, itself, and the folder that it may be relative to, besides the current one."""
    if isinstance(config, dict):
        bases = [config.get(key) for key in ("source", "checkpoint_dir", "data_dir")]
        folder = next((base for base in bases if isinstance(base, str)), folder)
        for key, value in config.items():
            if key != _NAMES_OF_PARAMETERS:
                yield from _texts(value, f"{prefix}.{key}" if prefix else str(key), folder)
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from _texts(value, f"{prefix}[{i}]", folder)
    elif isinstance(config, str):
        yield prefix, config, folder


def _names_on_the_way(text: str, folder: str | None, outputs: set[str]) -> Iterator[str]:
    """Names in ``output_dir`` that a path, or a pattern of paths, leads into."""
    text = os.path.expanduser(text.removeprefix("file://"))
    with contextlib.suppress(OSError, ValueError):  # such as a text that is no path
        for path in (folder and _matches(os.path.join(folder, text), outputs)) or _matches(text, outputs):
            for spelling in _spellings(path):
                for output in outputs:
                    if spelling.startswith(output) and spelling != output:
                        yield spelling.removeprefix(output).partition(os.sep)[0]


def _matches(path: str, outputs: set[str]) -> list[str]:
    """What there is of this path, or by this pattern: all that it matches, or one where none can be in ``outputs``."""
    if os.path.lexists(path):
        return [path]
    if not glob.has_magic(path):
        return []
    fixed = _spellings(os.path.dirname(re.split(r"[*?[]", path, maxsplit=1)[0]))
    is_near = any(out.startswith(part) or part.startswith(out) for part in fixed for out in outputs)
    return list(itertools.islice(glob.iglob(path, recursive=True), None if is_near else 1))


def _spellings(path: str) -> set[str]:
    """A path from the root as it is written and with its links followed, each with a ``/`` at its end."""
    return {os.path.join(absolute, "") for absolute in (os.path.abspath(path), os.path.realpath(path))}
