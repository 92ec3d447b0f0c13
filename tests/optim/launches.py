"""How often a test launches the kernels of CompactAdamW."""

import functools

import pytest


def count_launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts that go up with each launch from now on, by the name of what launches. Imports Triton."""
    from gmt_tune.masking.search import triton
    from gmt_tune.optim.kernels import carry, gather, update

    launching = (
        (gather, "gather_"),
        (update, "update_"),
        (carry, "carry"),
        (triton, "count_by_segment"),
        (triton, "place_"),
    )
    counts = {name: 0 for _, name in launching}

    def counted(name, launch):
        @functools.wraps(launch)
        def count(*arguments, **keywords):
            counts[name] += 1
            return launch(*arguments, **keywords)

        return count

    for module, name in launching:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return counts
