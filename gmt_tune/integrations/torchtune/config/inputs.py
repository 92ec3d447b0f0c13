"""Which files that a config names lie in its own ``output_dir``, where a run moves, replaces and deletes folders."""

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from gmt_tune.integrations.torchtune.config.public import leaves


def inputs_in(config, output_dir: Path) -> dict[str, str]:
    """Names in ``output_dir`` that paths of a config lead into, with the first key that does and its value.

    Files are looked at one by one only where they may lie in ``output_dir``: a data set may have very many.
    """
    outputs = _spellings(str(output_dir))
    texts = {key: leaf.value for key, leaf in leaves(config).items() if isinstance(leaf.value, str)}
    found: dict[str, str] = {}
    for key, text in texts.items():
        if not key.startswith("gradient_mask."):  # its patterns are of parameters, not of files
            for name in _names_on_the_way(text, _folder_of(key, texts), outputs):
                found.setdefault(name, f"{key} ({text})")
    return found


def _folder_of(key: str, texts: Mapping[str, str]) -> str | None:
    """The folder that a path may be relative to, besides the current one: that of the nearest section that has one."""
    while key:
        key = re.sub(r"(^|\.|\[)[^.[]*$", "", key)
        for name in ("source", "checkpoint_dir", "data_dir"):
            if f"{key}.{name}".lstrip(".") in texts:
                return texts[f"{key}.{name}".lstrip(".")]
    return None


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
