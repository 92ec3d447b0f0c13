"""What C++ does with entries on the CPU is what torch's operations do; and what happens where it cannot be built."""

import os
import stat
import subprocess
import sys
import warnings

import pytest
import torch

from gmt_tune.masking import native
from gmt_tune.masking.nonfinite import nonfinite_flags
from gmt_tune.masking.packing import pack_selection
from gmt_tune.masking.places import Places, take_ranked
from gmt_tune.masking.search import cpu
from gmt_tune.masking.selection import ThresholdSelection

SIZES = [0, 1, 7, 64, 1000, 65_536, 65_537, 1_200_001]


@pytest.fixture
def without(monkeypatch):
    """Calls a function with torch's operations alone."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(native, "load", lambda source: None)
            return function(*args, **kwargs)

    assert native.load(native.ENTRIES) is not None
    return call


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places(without, n, density, dtype):
    torch.manual_seed(n)
    mask = torch.rand(n) < density
    other = torch.where(torch.rand(n) < 0.5, mask, torch.rand(n) < density)
    bits = pack_selection(mask)
    places, wanted = Places(bits, n), without(Places, bits, n)
    assert places.count == wanted.count == int(mask.sum())
    assert torch.equal(places._stored, wanted._stored) and torch.equal(places._starts, wanted._starts)
    assert torch.equal(places.bits(), bits)
    values = torch.randn(n).to(dtype)
    gathered = places.gather(values)
    assert torch.equal(gathered, values[mask])
    twice, wanted_twice = gathered.clone(), gathered.clone()
    if n > 2:
        values[n // 2] = float("inf")
    assert places.gather_checked(values, twice, adds=True) == (n > 2)
    assert without(wanted.gather_checked, values, wanted_twice, adds=True) == (n > 2)
    assert torch.equal(twice, wanted_twice)
    values = torch.randn(n).to(dtype)
    assert not places.gather_checked(values, gathered, adds=False) and torch.equal(gathered, values[mask])
    before = Places(pack_selection(other), n)
    ranks, wanted_ranks = list(places.ranks_in(before)), without(lambda: list(wanted.ranks_in(before)))
    assert [each[:2] for each in ranks] == [each[:2] for each in wanted_ranks]
    for (part, near, rank), (*_, wanted_rank) in zip(ranks, wanted_ranks, strict=True):
        assert torch.equal(rank, wanted_rank)
        for held in (torch.randn(before.count), torch.arange(before.count).to(torch.int16)):
            out, wanted_out = torch.empty(2, part.stop - part.start, dtype=held.dtype)
            take_ranked(held[near], rank, near.start, out)
            without(take_ranked, held[near], rank, near.start, wanted_out)
            assert torch.equal(out, wanted_out)
    if places.count:
        magnitude = gathered[:1].abs().view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[0]
        found, wanted_found = places.find(gathered, magnitude), without(wanted.find, gathered, magnitude)
        assert len(found[0]) and all(map(torch.equal, found, wanted_found))
        places.drop_(*found)
        without(wanted.drop_, *found)
        assert torch.equal(places.bits(), wanted.bits()) and places.count == wanted.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [5_000, 65_537, 1_200_001])
@pytest.mark.parametrize("kind", ["normal", "zeros", "spread", "tiny", "nonfinite", "huge"])
def test_thresholds_and_packing(without, dtype, n, kind):
    torch.manual_seed(0)
    x = torch.randn(n)
    if kind == "zeros":
        x *= torch.rand(n) < 0.3
    elif kind == "spread":
        x = torch.exp(x * 20)
    elif kind == "tiny":
        x *= 1e-39
    elif kind == "nonfinite":
        x[5], x[7] = float("nan"), float("-inf")
    elif kind == "huge":
        x = x.sign() * 3.4e38
    x = x.to(dtype)
    for k in (1, n // 20, n // 2, n):
        rank = cpu.kth_largest([[x]], [k])
        assert rank == without(cpu.kth_largest, [[x]], [k])
    selection = ThresholdSelection(x, x.abs().median())
    assert torch.equal(selection.pack().bits, without(selection.pack).bits)
    assert [bool(flag) for flag in nonfinite_flags([x])] == [not x.isfinite().all()]


@pytest.mark.parametrize("n", [1, 100, 65_536, 200_001])
@pytest.mark.parametrize("k", [1, 7, 5_000, 60_000, 200_001])
@pytest.mark.parametrize("levels", [2, 40, 1 << 20])  # of values: few tie everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_of_the_largest_are_exactly_k_the_first_of_ties(n, k, levels, dtype):
    torch.manual_seed(k)
    values = torch.randint(levels, (n,)).to(dtype) * (1 - 2 * torch.randint(2, (n,)).to(dtype))
    k = min(k, n, int(values.count_nonzero()) or 1)
    order = values.abs().float().sort(descending=True, stable=True)
    smallest = max(1, int(order.values[k - 1].to(dtype).view(torch.int16 if dtype == torch.bfloat16 else torch.int32)))
    mask = torch.zeros(n, dtype=torch.bool).index_fill_(0, order.indices[:k], True) & (values != 0)
    places, wanted = Places.of_largest(values, smallest, k), Places(pack_selection(mask), n)
    assert places.count == wanted.count == int(mask.sum()) and torch.equal(places.bits(), wanted.bits())
    assert torch.equal(places._stored, wanted._stored) and torch.equal(places._starts, wanted._starts)


@pytest.mark.parametrize("script", ["exit 1", "echo 'no such flag' >&2; exit 2"])
def test_without_a_compiler_that_works_a_warning_says_so_once(tmp_path, monkeypatch, script):
    compiler = tmp_path / "broken"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="use PyTorch's own operations"):
            assert native.load(native.ENTRIES) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not nonfinite_flags([torch.ones(10)])[0]
        assert not list((tmp_path / "cache" / "gmt_tune").iterdir())
    finally:
        native.load.cache_clear()


def test_what_was_built_is_kept_for_its_user_alone(tmp_path):
    code = "from gmt_tune.masking import native; print(native.load(native.ENTRIES)._name)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    names = {
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    (folder,) = tmp_path.iterdir()
    assert len(names) == 1 and names.pop().strip() == str(next(folder.iterdir()))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["a file", "open to others"])
def test_where_nothing_can_be_kept_it_is_built_for_one_process(tmp_path, monkeypatch, kind):
    if kind == "a file":
        (tmp_path / "gmt_tune").write_text("")
    else:
        (tmp_path / "gmt_tune").mkdir()
        (tmp_path / "gmt_tune").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.cache_clear()
    try:
        assert str(tmp_path) not in native.load(native.ENTRIES)._name
        assert kind == "a file" or not list((tmp_path / "gmt_tune").iterdir())
    finally:
        native.load.cache_clear()
