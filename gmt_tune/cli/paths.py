"""Paths on a command line."""

from pathlib import Path


def as_path(text: str) -> Path:
    """A path, ``~`` replaced by the home folder: shells leave it as it is within quotes and behind ``=``."""
    return Path(text).expanduser()
