"""The benchmark of the look at data files takes every kind of row that it names, and finds none of them wrong."""

from benchmarks import data_scan


def test_every_kind_of_rows_is_scanned(tmp_path):
    found = data_scan.measure(rows=20, repeats=1, folder=tmp_path)
    assert [name for name, _, _ in found] == list(data_scan.KINDS)
    assert all(size > 500 and len(rates) == 3 and min(rates) > 0 for _, size, rates in found)
