"""Which files that a config names lie in its own ``output_dir``, where a run moves, replaces and deletes folders."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path


def inputs_in(config, output_dir: Path, prefix: str = "", folder: str | None = None) -> dict[str, str]:
    """Names in ``output_dir`` that paths of a config lead into, with the key and value of one of them.

    Args:
        config: as plain dicts and lists.
        output_dir: exists.
        prefix: of the keys.
        folder: that paths may be relative to, besides the current one.
    """
    if isinstance(config, dict):
        bases = [config.get(key) for key in ("source", "checkpoint_dir", "data_dir")]
        folder = next((base for base in bases if isinstance(base, str)), folder)
        parts = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in config.items()]
    elif isinstance(config, list):
        parts = [(f"{prefix}[{i}]", value) for i, value in enumerate(config)]
    else:
        names = _names_on_the_way(config, folder, output_dir) if isinstance(config, str) else ()
        return {name: f"{prefix} ({config})" for name in names}
    # The first key wins
    parts.reverse()
    return {name: key for part in parts for name, key in inputs_in(part[1], output_dir, part[0], folder).items()}


def _names_on_the_way(text: str, folder: str | None, output_dir: Path) -> Iterator[str]:
    """Names in ``output_dir`` that a path, or a pattern of paths, leads into."""
    text = os.path.expanduser(text.removeprefix("file://"))
    for written in (text, os.path.join(folder, text)) if folder else (text,):
        for path in {p for there in _matches(written) for p in (os.path.abspath(there), os.path.realpath(there))}:
            for part in (Path(path), *Path(path).parents):
                with contextlib.suppress(OSError):
                    if os.path.samefile(part.parent, output_dir) and part != part.parent:
                        yield part.name


def _matches(path: str) -> list[str]:
    """What there is of this path, or by this pattern."""
    with contextlib.suppress(OSError, ValueError):  # such as a text that is no path
        if os.path.lexists(path):
            return [path]
        if glob.has_magic(path):
            return glob.glob(path, recursive=True)
    return []
