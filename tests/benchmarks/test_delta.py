"""The benchmark of deltas measures each way in a process of its own; memory does not grow with the model."""

import pytest

from benchmarks import delta


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    entries = delta.save_pair(folder, layers=1, density=0.05, vocabulary=4)
    assert entries == 2048 * (4 + 2048 + 2 * 8192)
    return folder


def test_a_delta_is_made_in_less_memory_than_the_naive_way(folder):
    ours, naive = delta.measure("delta", folder), delta.measure("naive", folder)
    assert ours["peak_bytes"] < naive["peak_bytes"] - 2 * 2048 * 8192  # of half of one of the two models
    assert (folder / "delta.safetensors").stat().st_size < 0.5 * (folder / "naive.safetensors").stat().st_size
