"""Which release of a package is installed, without importing it."""

import importlib.metadata
import re


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution as pip shows it, or None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, for comparisons."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
