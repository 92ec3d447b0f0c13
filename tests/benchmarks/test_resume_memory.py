"""A resume on another number of ranks holds little more than the state that a rank ends up with."""

import pytest

from benchmarks import resume_memory


@pytest.mark.slow
@pytest.mark.parametrize("saved_by, resumed_by", [(4, 2), (2, 4)])
def test_the_peak_is_at_most_half_again_a_ranks_own_state(saved_by, resumed_by):
    found = resume_memory.measure(saved_by, resumed_by, "AdamW", layers=12)
    assert found["state_mb"] > 2 * 12 * 4 / resumed_by and 1 <= found["ratio"] <= 1.5
