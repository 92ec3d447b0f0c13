"""Parameters of a test, of which some make it slow."""

from collections.abc import Callable, Iterable

import pytest


def slow_where(is_slow: Callable[[str], bool], names: Iterable[str]) -> list:
    """The names as parameters, marked ``slow`` where that holds."""
    return [pytest.param(name, marks=pytest.mark.slow) if is_slow(name) else name for name in names]
