"""Triton's kernels against torch, in processes of their own: of test_kernels.py in the interpreter, on CPU tensors;
of test_gpu.py on a GPU. Those marked ``slow`` take the interpreter long; a GPU takes them all.

Two things the interpreter does otherwise than a GPU: it rounds a fused multiplication and addition twice, so that
moments can be off by 1 unit in the last place of what they are made of; and it cuts float32 off to make bfloat16, which
is why the kernels round by themselves.
"""

import dataclasses
import itertools
import os
import runpy
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from optim.launches import count_launches
from quick_interpreter import patch_once_a_launch
from torch import nn

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.masking import ties
from gmt_tune.masking.packing import pack_selection
from gmt_tune.masking.parts import part_of
from gmt_tune.masking.places import SEGMENT, Lookup, Places
from gmt_tune.masking.scores import select_largest
from gmt_tune.masking.search import devices
from gmt_tune.masking.search import triton as search
from gmt_tune.masking.search.entries import Product
from gmt_tune.masking.search.kernels import place
from gmt_tune.optim import by_kernels, states
from gmt_tune.optim.kernels import carry, gather

oracle_tests = runpy.run_path(str(Path(__file__).with_name("test_compact_adamw.py")))
DTYPES = [torch.float32, torch.bfloat16]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if IS_INTERPRETED:
    patch_once_a_launch()
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="test_gpu.py has the same on a GPU")
# Entries and density: one entry, bits with a part of a word, offsets and bits over segments of which some are empty
SIZES = {
    "one entry": (1, 1.0),
    "a few": (300, 0.5),
    "offsets": (3 * SEGMENT + 777, 0.05),
    "very few": (5 * SEGMENT + 1, 2e-5),
    "bits": (SEGMENT + 8_001, 0.12),
}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Counts launches; thresholds are not at issue here, and the search's kernels are left out."""
    counts = count_launches(monkeypatch)
    if IS_INTERPRETED:
        for module, tile in ((gather, 1 << 12), (carry, 1 << 12), (place, 1 << 14)):
            monkeypatch.setattr(module, "TILE", tile)  # few large tiles are faster here
    monkeypatch.setattr(devices, "_failures", [])
    ours = {name: getattr(search, name) for name in ("on_device", "can_pack", "place_thresholds")}
    for module in (by_kernels, ties):
        monkeypatch.setattr(
            module, "kernels_for", lambda members: None if devices._failures else types.SimpleNamespace(**ours)
        )
    torch.set_default_device("cpu" if IS_INTERPRETED else "cuda")
    yield counts
    torch.set_default_device(None)
    assert devices._failures == []


def selection_of(n: int, density: float) -> torch.Tensor:
    mask = torch.rand(n) < density
    mask[70_000 : 2 * SEGMENT + 5_000] = False
    mask[n // 2] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_gathered_entries_are_those_of_the_mask_and_added_up(size, dtype, launches):
    torch.manual_seed(0)
    n, density = SIZES[size]
    mask = selection_of(n, density)
    places = Places(pack_selection(mask), n)
    assert (places.lookup.ranks is None) == (size in ("offsets", "very few"))
    first, second = (torch.randn(n).to(dtype) for _ in range(2))
    assert by_kernels.can_gather(places, first)
    waiting, size = by_kernels.Waiting(), places.count + 3
    values, flag = waiting.add(places, first, None, size)
    waiting.run()
    assert torch.equal(values, nn.functional.pad(first[mask], (0, 3))) and not flag
    values[-1] = 7  # padding stays as it is where entries are added
    second[n // 3] = torch.inf
    added, flag = waiting.add(places, second, (values, flag), size)
    waiting.run()
    wanted = first[mask] + second[mask]
    assert torch.equal(added[:-3], wanted) and added[-3:].tolist() == [0, 0, 7] and bool(flag)
    assert added is values
    waiting.add(places, first, (added, flag), size)
    waiting.add(places, -first, (added, flag), size)  # one behind the other
    assert launches["gather_"] == 3
    waiting.run()
    assert bool(flag), "a flag that is set stays"
    assert torch.equal(added[:-3], wanted + first[mask] - first[mask])
    assert launches["gather_"] == 4
    unread = torch.full((size,), 3, dtype=dtype)
    by_kernels.gather_([by_kernels.Gather(places, first, unread)])
    assert torch.equal(unread, nn.functional.pad(first[mask], (0, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_gradients_are_gathered_in_a_launch_each_kind(dtype, launches, monkeypatch):
    """Also those at an address that is odd, and as many as wait for each other at most."""
    torch.manual_seed(0)
    sizes = [1, 300, 5_000, 70_001, SEGMENT]
    masks = [torch.rand(n) < density for n, density in zip(sizes, (1.0, 0.5, 0.05, 0.03, 0.3), strict=True)]
    places = [Places(pack_selection(mask), n) for mask, n in zip(masks, sizes, strict=True)]
    gradients = [torch.randn(n).to(dtype) for n in sizes[:-1]] + [torch.randn(SEGMENT + 1).to(dtype)[1:]]
    gradients[2][7] = torch.nan
    waiting = by_kernels.Waiting()
    found = [waiting.add(p, g, None, p.count) for p, g in zip(places, gradients, strict=True)]
    assert launches["gather_"] == 0
    waiting.run()
    assert launches["gather_"] == 3  # bits; offsets; bits at an odd address
    for (values, _), mask, gradient in zip(found, masks, gradients, strict=True):
        assert torch.equal(values.view(torch.uint8), gradient[mask].view(torch.uint8))
    assert [bool(flag) for _, flag in found] == [False, False, True, False, False]
    monkeypatch.setattr(by_kernels, "_TOGETHER", 2 * gradients[3].nbytes - 1)
    waiting.add(places[3], gradients[3], None, places[3].count)
    assert launches["gather_"] == 3
    waiting.add(places[3], gradients[3], None, places[3].count)
    assert launches["gather_"] == 4
    waiting.run()
    assert launches["gather_"] == 4


def test_nan_and_infinities_are_seen_wherever_they_are():
    places = Places(pack_selection(torch.arange(40_000) % 50 == 7), 40_000)
    for dtype in DTYPES:
        gathers, wanted = [], []
        for at, bad in ((0, torch.nan), (39_999, -torch.inf), (16_384, torch.inf), (20_001, torch.nan), (5, 0.0)):
            gradient = torch.full((40_000,), torch.finfo(dtype).max, dtype=dtype)
            gradient[at] = bad
            flag = torch.zeros((), dtype=torch.bool)
            gathers.append(by_kernels.Gather(places, gradient, torch.empty(800, dtype=dtype), flag))
            wanted.append(bad != 0)
        by_kernels.gather_(gathers)
        assert [bool(gather.flag) for gather in gathers] == wanted


def test_more_than_four_billion_entries_are_addressed():
    n = 2**32 + 1000
    # On the CPU most of it is never touched
    gradient = torch.from_numpy(numpy.zeros(n, dtype=numpy.int16)).view(torch.bfloat16).to(torch.get_default_device())
    gradient[-1000:] = torch.arange(1000).to(torch.bfloat16)
    gradient[5] = 3
    starts = torch.full((-(-n // SEGMENT) + 1,), 1)
    starts[0] = 0
    lookup = Lookup(torch.tensor([5, 0, 7, 999], dtype=torch.int16), starts, None)
    places: Any = types.SimpleNamespace(lookup=lookup, count=4)
    out = torch.empty(4, dtype=torch.bfloat16)
    gather.gather_([by_kernels.Gather(places, gradient, out)])
    assert out.tolist() == [3, 0, 7, gradient[-1].item()]


def ranked(n: int, kind: str, dtype: torch.dtype) -> torch.Tensor | Product:
    """Scores of entries, of which some tie and a whole segment is zero."""
    values = torch.randn(n).to(dtype)
    values[SEGMENT : 2 * SEGMENT] = 0
    if kind == "ties":
        values = (values * 4).round()
    return Product(values, torch.randn(n).bfloat16()) if kind == "product" else values


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "magnitudes"), (torch.bfloat16, "ties"), (torch.bfloat16, "product")], ids=str
)
def test_places_are_the_first_k_of_a_stable_sort(dtype, kind, launches):
    torch.manual_seed(0)
    densities = {"one entry": (1, 1.0), "a few": (300, 0.5), "offsets": (3 * SEGMENT + 777, 0.05), "zeros": (777, 0.1)}
    densities |= {"bits": (SEGMENT + 8_001, 0.12), "more than there are": (SEGMENT + 5, 0.999)}
    for density in {density for _, density in densities.values()}:
        scores = [ranked(n, kind, dtype) for n, own in densities.values() if own == density]
        if density == 0.1:
            scores[-1].copy_(torch.zeros(777)) if kind != "product" else scores[-1].grad.zero_()
        if density == 0.5 and kind != "product":
            scores.append(scores[0].clone().view(20, 15).t())  # left to torch
        parts = [part_of(score.read(lambda t: t) if kind == "product" else score) for score in scores]
        selections = select_largest([part_of(part.local.clone()) for part in parts], scores, density)
        before = dict(launches)
        placed, counts = ties.place_exactly(parts, selections, [s.threshold for s in selections], density)
        assert launches["count_by_segment"] == before["count_by_segment"] + 1
        assert launches["place_"] == before["place_"] + 1
        for part, selection, count in zip(parts, placed, counts, strict=True):
            magnitudes = part.local.float().abs().reshape(-1)
            k = max(1, int(density * magnitudes.numel()))
            first = magnitudes.sort(descending=True, stable=True).indices[: min(k, int((magnitudes > 0).sum()))]
            mask = torch.zeros(magnitudes.numel(), dtype=torch.bool).index_fill_(0, first, True)
            places, wanted = selection.places, Places(pack_selection(mask), mask.numel())
            assert int(count) == places.count == int(mask.sum()) and torch.equal(selection.bits, pack_selection(mask))
            for ours, theirs in zip(places.lookup, wanted.lookup, strict=True):
                assert ours is theirs is None or torch.equal(ours, theirs)
            assert [part for _, part, _ in places.chunks()] == [part for _, part, _ in wanted.chunks()]


@interpreted
def test_of_what_is_sharded_places_are_found_by_kernels_and_ties_dropped_by_all_ranks(launches):
    """One rank is enough to see that ties, which only all ranks together know to be too many, are left to them."""
    torch.manual_seed(0)
    values = ranked(2 * SEGMENT + 99, "ties", torch.bfloat16)
    (selection,) = select_largest([part_of(values.clone())], [values], 0.05)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parts = [dataclasses.replace(part_of(values), groups=g) for g in ((torch.distributed.group.WORLD,), ())]
        (sharded,), (whole,) = (ties.place_exactly([p], [selection], [None], 0.05)[0] for p in parts)
    finally:
        torch.distributed.destroy_process_group()
    assert launches["place_"] == 2
    assert sharded.places.count == whole.places.count == int(0.05 * values.numel())
    assert torch.equal(sharded.bits, whole.bits)
    for each, other in zip(sharded.places.lookup, whole.places.lookup, strict=True):
        assert each is other is None or torch.equal(each, other)


def test_launches_do_not_grow_with_the_number_of_tensors_that_are_due(launches):
    """Of all kernels that belong to turns; the device is waited for once, where the counts are read."""
    found = []
    for number in (1, 4):
        before = dict(launches)
        weights = {str(i): nn.Parameter(torch.randn(60, 100 + i)) for i in range(number)}
        optimizer = CompactAdamW(weights.values(), state_bits=8)
        GradientMask(weights.items(), 0.1 if number == 1 else 0.03).register(optimizer)
        for _ in range(2):
            sum(p.square().sum() for p in weights.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        turns = ("count_by_segment", "place_", "carry")
        found.append({name: launches[name] - before[name] for name in turns})
    assert found == [dict.fromkeys(found[0], 2)] * 2


def places_of(n: int, density: float) -> Places:
    return Places(pack_selection(selection_of(n, density)), n)


@pytest.mark.parametrize(
    ("state_bits", "age"), [pytest.param(32, torch.int32, marks=pytest.mark.slow), (8, torch.int16)], ids=str
)
def test_states_of_what_stays_are_carried_over_as_torch_does_it(state_bits, age, launches):
    """From bits and offsets to bits and offsets, some kept and some not; and where nothing was selected before."""
    torch.manual_seed(0)
    n = 3 * SEGMENT + 20_001
    nothing = Places(pack_selection(torch.zeros(n) > 0), n)
    few, many = places_of(n, 0.05), places_of(n, 0.2)
    turns = [(old, places_of(n, density)) for old in (few, many) for density in (0.04, 0.15)]
    turns += [(None, few), (nothing, many), (few, few), (places_of(300, 0.5), places_of(300, 0.4))]
    turns += [(places_of(1, 1.0), places_of(1, 1.0)), (few, nothing)]
    p = nn.Parameter(torch.zeros(1))
    states_by: dict[str, list] = {"torch": [], "kernels": []}
    for (before, places), held in itertools.product(turns, states_by.values()):
        torch.manual_seed(before.count if before else 0)
        size = states.padded_size(before.count, state_bits) if before and before.count else 0
        state = {} if not size else {"age": torch.randint(1, 99, (size,)).to(age)}
        for key in ("exp_avg", "exp_avg_sq")[: 2 * bool(size)]:
            state[key] = states.zeros((size,), state_bits, signed=key == "exp_avg", device=p.device)
            values = torch.randn(size) * torch.randn(size).exp()
            states.fill_(state[key], values if key == "exp_avg" else values.square())
        gradient = torch.zeros(states.padded_size(places.count, state_bits))
        held.append((state, before, places, gradient))
    optimizer = CompactAdamW([p], state_bits=state_bits)
    for turn in states_by["torch"]:
        optimizer._carry_(*turn, age)
    left = by_kernels.carry_(states_by["kernels"], state_bits, [age] * len(states_by["kernels"]))
    assert left == [len(turns) - 1], "what has no entry is left to torch"
    assert launches["carry"] == (4 if state_bits == 32 else 5)  # offsets, bits; few entries keep 32 bits
    carried = 0
    for (ours, *_), (wanted, *_) in zip(states_by["kernels"][:-1], states_by["torch"][:-1], strict=True):
        assert ours.keys() == wanted.keys()
        for key, value in wanted.items():
            assert type(ours[key]) is type(value) and ours[key].dtype == value.dtype
            names = ("codes", "scale", "qmap") if states.is_8bit(value) else ()
            pairs = [(getattr(ours[key], name), getattr(value, name)) for name in names] or [(ours[key], value)]
            assert all(torch.equal(*pair) for pair in pairs)
        carried += int((ours["age"] > 0).sum())
    assert carried > 10_000


def member_of(size: str, dtype: torch.dtype, state_bits: int) -> tuple:
    torch.manual_seed(list(SIZES).index(size))
    n, density = SIZES[size]
    places = Places(pack_selection(selection_of(n, density)), n)
    padded = states.padded_size(places.count, state_bits)
    entries = torch.arange(padded) < places.count
    entries[256:512] = False  # a whole block of zeros
    state = {"age": torch.randint(0, 60, (padded,), dtype=torch.int16)}
    state["age"][-1] = 32767
    state["age"][: padded // 3] = 0
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        values = torch.randn(padded) * torch.randn(padded).exp() * entries * 0.1
        state[key] = states.zeros((padded,), state_bits, signed=signed, device=values.device)
        states.fill_(state[key], values if signed else values.square())
    gradient = (torch.randn(padded) * torch.randn(padded).exp() * entries).to(dtype)
    return torch.randn(n).to(dtype), gradient, state, places


def update_by_torch(member: tuple, group: dict) -> None:
    weight, gradient, state, places = member
    state["age"].clamp_(max=32766).add_(1)
    values = nn.functional.pad(places.gather(weight), (0, gradient.numel() - places.count))
    moments = [state["exp_avg"]], [state["exp_avg_sq"]]
    states.adamw_([values], [gradient], [state["age"]], *moments, group, stochastic_round=False)
    places.scatter_(values, weight)


@pytest.mark.parametrize(
    ("dtype", "state_bits", "betas"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case[1:] not in ((8, (0.9, 0.999)), (32, (0.0, 0.0)))))
        for case in itertools.product(DTYPES, (32, 8), [(0.9, 0.999), (0.0, 0.0)])
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # with a beta of 0, in what is not taken
def test_updates_equal_those_of_torch(dtype, state_bits, betas, launches):
    """With betas of 0 nothing is rounded but as torch rounds it: bit for bit."""
    is_exact = betas == (0.0, 0.0)
    lr = torch.tensor(0.01) if state_bits == 8 else 0.01  # on the device, where the kernel reads it
    group = {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.1}
    by_torch, found, before = ([member_of(size, dtype, state_bits) for size in SIZES] for _ in range(3))
    for member in by_torch:
        update_by_torch(member, group)
    assert by_kernels.update_(found, group, stochastic_round=False) == []
    assert launches["update_"] == (2 if state_bits == 32 else 4)  # offsets, bits; few entries keep 32 bits
    moves = 0
    for (w, g, state, places), (want_w, _, want, _), (old_w, _, old, _) in zip(found, by_torch, before, strict=True):
        assert torch.equal(state["age"], want["age"])
        moved = w != old_w
        assert not moved[~selection_of_places(places)].any()
        moves += int(moved.sum())
        gradients = {"exp_avg": g.float().abs(), "exp_avg_sq": g.float().square()}
        for key, largest in gradients.items():
            a, b = states.to_floats(state[key]), states.to_floats(want[key])
            if is_exact or type(state[key]) is not torch.Tensor:
                off = (a - b).abs() / b.abs().clamp(min=1e-30)
                assert off.max() == 0 if is_exact else (off > 1e-6).float().mean() < 1e-3
                if is_exact and type(state[key]) is not torch.Tensor:
                    assert torch.equal(state[key].codes, want[key].codes)
                    assert torch.equal(state[key].scale, want[key].scale)
            else:
                largest = torch.maximum(largest, states.to_floats(old[key]).abs())
                assert ((a - b).abs() <= largest * 2**-23).all()
        off = (w.double() - want_w.double()).abs() / (want_w.double().abs() + 0.01)
        # A GPU rounds what is multiplied and added once
        assert off.max() == 0 if is_exact and IS_INTERPRETED else (off > 1e-6).double().mean() < 1e-4
    assert moves > 0.5 * sum(places.count for *_, places in found) > 5000


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_tensors_are_updated_as_torch_does(dtype, state_bits, launches):
    group = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}

    def members() -> list[tuple]:
        torch.manual_seed(0)
        found = []
        for step, shape in ((1.0, (577,)), (30.0, (32, 256)), (2.0, (3, 1))):
            weight, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            state = {"step": torch.tensor(step)}
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                values = torch.randn(shape) * 0.1
                state[key] = states.zeros(shape, state_bits, signed=signed, device=weight.device)
                state[key].copy_(values if signed else values.square())
            found.append((weight, gradient, state, None))
        return found

    by_torch, found, before = members(), members(), members()
    for weight, gradient, state, _ in by_torch:
        moments = [state["exp_avg"].view(-1)], [state["exp_avg_sq"].view(-1)]
        flat = [weight.view(-1)], [gradient.view(-1)]
        states.adamw_(*flat, [state["step"]], *moments, group, stochastic_round=False)
    assert by_kernels.update_(found, group, stochastic_round=False) == []
    assert launches["update_"] == (1 if state_bits == 32 else 2)
    for (w, _, state, _), (want_w, _, want, _), (old_w, *_) in zip(found, by_torch, before, strict=True):
        assert (w != old_w).float().mean() > 0.3
        assert ((w.double() - want_w.double()).abs() / (want_w.double().abs() + 0.01) > 1e-6).double().mean() < 1e-3
        assert torch.equal(state["step"], want["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            off = (states.to_floats(state[key]) - states.to_floats(want[key])).abs()
            assert (off > 1e-6).float().mean() < 1e-3, key


def selection_of_places(places: Places) -> torch.Tensor:
    mask = torch.zeros(places.numel, dtype=torch.bool)
    for _, _, index in places.chunks():
        mask[index] = True
    return mask


def test_states_that_the_kernel_does_not_know_are_left(launches):
    group = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    known, four, strided = (member_of("offsets", torch.float32, bits) for bits in (32, 4, 32))
    strided = (torch.randn(2 * strided[0].numel())[::2], *strided[1:])
    nothing = (torch.ones(9), torch.zeros(1), {}, Places(torch.zeros(2, dtype=torch.uint8), 9))
    assert by_kernels.update_([four, known, strided, nothing], group, stochastic_round=False) == [0, 2, 3]
    assert launches["update_"] == 1


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_stochastic_rounding_takes_a_neighbour_by_chance_and_repeats_itself():
    n, fraction = 4101, 0.25
    # The step goes a quarter of the way from 1 to the bfloat16 below
    group = {"lr": 2**-8 * fraction, "betas": (0.0, 0.0), "eps": 1e-12, "weight_decay": 0.0}
    places = Places(pack_selection(torch.ones(n) > 0), n)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        members = []
        for _ in range(2):
            state = {"exp_avg": torch.zeros(n), "exp_avg_sq": torch.zeros(n), "age": torch.zeros(n, dtype=torch.int16)}
            members.append((torch.ones(n).bfloat16(), torch.ones(n).bfloat16(), state, places))
        assert by_kernels.update_(members, group, stochastic_round=True) == []
        found.append(torch.stack([weight for weight, *_ in members]))
    assert torch.equal(found[0], found[1])
    assert found[0].unique().tolist() == [1 - 2**-8, 1]
    went = found[0] < 1
    assert went.float().mean().item() == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / 2 / n) ** 0.5)
    for others in (went[1], (found[2] < 1)[0], went[0].roll(1)):  # each entry of a launch has chances of its own
        assert (went[0] & others).float().mean().item() == pytest.approx(fraction**2, abs=0.02)


@interpreted
@pytest.mark.parametrize(
    "key", ["refresh 7, accumulation 1, torch.bfloat16", pytest.param("saliency", marks=pytest.mark.slow)]
)
def test_whole_steps_equal_the_dense_oracle(key, launches):
    oracle_tests["test_equals_dense_tensors_with_a_mask"](key)
    assert launches["gather_"] > 8 and launches["update_"] == 18  # selected entries, the dense norm
    assert launches["place_"] > 0 and launches["carry"] > 0


@interpreted
@pytest.mark.parametrize("state_bits", [8])
def test_quantized_steps_equal_the_dense_oracle(state_bits, launches):
    oracle_tests["test_quantized_moments_equal_the_oracles_through_the_same_classes"](state_bits)
    assert launches["update_"] == 16 and launches["gather_"] == 8
