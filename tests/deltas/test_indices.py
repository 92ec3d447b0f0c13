"""The coding of changed entries: what is coded comes back, in no more bytes than a bit an entry or two an index."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmt_tune.deltas.indices import BLOCK, decode, encode


def check(indices: np.ndarray, numel: int) -> int:
    """Returns the bytes that it takes."""
    coded = encode(indices, numel)
    assert np.array_equal(decode(coded, numel), indices)
    return len(coded)


@given(st.integers(1, 3000).flatmap(lambda numel: st.tuples(st.just(numel), st.sets(st.integers(0, numel - 1)))))
def test_any_entries_come_back(case):
    numel, entries = case
    size = check(np.array(sorted(entries), dtype=np.int64), numel)
    assert size <= min((numel + 7) // 8, 2 * len(entries))


@pytest.mark.parametrize("density", [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_a_whole_block_takes_no_more_than_bits_or_two_bytes_an_index(density):
    changed = np.random.default_rng(0).random(BLOCK) < density
    size, values = check(np.flatnonzero(changed), BLOCK), 2 * changed.sum()  # of bf16
    assert size <= BLOCK // 8 and values + size <= 1.3 * (values + min(BLOCK / 8, 2 * changed.sum()))


@pytest.mark.parametrize("indices", [[0], [BLOCK - 1], [0, BLOCK - 1], [127], [128], [128, 257], [2**14], [2**14 + 1]])
def test_gaps_at_the_edges_of_a_byte(indices):
    check(np.array(indices, dtype=np.int64), BLOCK)


@given(st.binary(max_size=40), st.integers(1, 400))
def test_bytes_that_nobody_coded_are_refused_or_give_entries_of_the_block(coded, numel):
    try:
        indices = decode(np.frombuffer(coded, dtype=np.uint8), numel)
    except ValueError:
        return
    assert (np.diff(indices) > 0).all() and all(0 <= index < numel for index in indices)
