"""Triton's kernels in its interpreter, on CPU tensors: run by test_triton.py in a process of its own.

What is marked ``slow`` runs only where the slow case of test_triton.py asks for it.

What is checked is the public functions, led to the kernels instead of to the CPU's search.
"""

import itertools
import math
import os

import full_sort
import hypothesis
import hypothesis.strategies as st
import numpy
import pytest
import torch
from quick_interpreter import patch_once_a_launch
from test_selection import DTYPES, clone_with_strides, densities, parameters_with, tensors

from gmt_tune import GradientMask, kth_largest_magnitude, mask_grads_
from gmt_tune.masking import selection
from gmt_tune.masking.bits import INT_DTYPE, NAN_BITS, from_bits
from gmt_tune.masking.parts import part_of
from gmt_tune.masking.scores import select_largest
from gmt_tune.masking.search import devices
from gmt_tune.masking.search import triton as kernels
from gmt_tune.masking.search.kernels import apply, apply_packed, count, draw, pack, sample, tables

hypothesis.settings.register_profile(
    "interpreter", deadline=None, max_examples=int(os.environ["EXAMPLES"]), derandomize=True
)
hypothesis.settings.load_profile("interpreter")
patch_once_a_launch()
COUNTED = ("kth_largest", "apply_thresholds_", "pack_thresholds", "apply_packed_selections_", "apply_random_draws_")
FIXTURE = hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    launches = dict.fromkeys(COUNTED, 0)

    def counted(name, function):
        def launch(*arguments):
            launches[name] += 1
            return function(*arguments)

        return launch

    for name in COUNTED:
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    monkeypatch.setattr(devices, "_SERVED", ("cpu",))
    return launches


@pytest.fixture
def small(monkeypatch):
    """Lets a few hundred entries be many chunks and tiles, and a sample miss now and then."""
    monkeypatch.setattr(tables, "CHUNK", 256)
    for module, tile in ((count, 128), (apply, 64), (pack, 64), (apply_packed, 64), (draw, 64)):
        monkeypatch.setattr(module, "CHUNK", 256)
        monkeypatch.setattr(module, "TILE", tile)
    monkeypatch.setattr(sample, "SAMPLE", 32)


@FIXTURE
@hypothesis.given(tensor=tensors(), data=st.data())
def test_threshold_equals_full_sort(small, tensor, data):
    k = data.draw(st.one_of(st.just(1), st.just(tensor.numel()), st.integers(1, tensor.numel())))
    threshold = kth_largest_magnitude(tensor, k)
    wanted = full_sort.kth_largest([tensor], k).to(tensor.dtype)
    assert full_sort.same_bits(threshold, wanted) or (threshold.isnan() and wanted.isnan())


@FIXTURE
@hypothesis.given(grads=st.lists(tensors(300), min_size=1, max_size=5), density=densities, data=st.data())
def test_mask_equals_full_sort(small, grads, density, data):
    scope = data.draw(st.sampled_from(["tensor", "global"]))
    wanted = full_sort.mask(grads, density, scope)
    parameters = parameters_with([clone_with_strides(grad) for grad in grads])
    statistics = mask_grads_(parameters, density, scope=scope, error_if_nonfinite=False)
    for i, (p, want) in enumerate(zip(parameters, wanted, strict=True)):
        assert full_sort.same_bits(p.grad, want)
        assert int(statistics.selected[str(i)]) == int((want != 0).sum())


@FIXTURE
@hypothesis.given(grads=st.lists(tensors(300), min_size=1, max_size=3), density=densities, data=st.data())
def test_mask_by_saliency_equals_full_sort(small, grads, density, data):
    scope = data.draw(st.sampled_from(["tensor", "global"]))
    parameters = parameters_with([clone_with_strides(grad) for grad in grads])
    for p in parameters:
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    scores = [grad * p.detach() for grad, p in zip(grads, parameters, strict=True)]
    wanted = full_sort.mask(grads, density, scope, scores)
    mask_grads_(parameters, density, scope=scope, score="saliency", error_if_nonfinite=False)
    for p, want in zip(parameters, wanted, strict=True):
        assert full_sort.same_bits(p.grad, want)


@pytest.mark.parametrize(
    ("misled", "dtype"),
    [
        pytest.param(misled, dtype, marks=[pytest.mark.slow] * (misled != (dtype == DTYPES[1])))
        for misled, dtype in itertools.product((False, True), DTYPES)
    ],
    ids=str,
)
def test_threshold_is_exact_at_full_size_however_bad_the_sample(dtype, misled, monkeypatch, on_kernels):
    if misled or dtype != torch.bfloat16:  # more counts: in few large tiles, which the interpreter is faster with
        monkeypatch.setattr(count, "TILE", 1 << 14)
        monkeypatch.setattr(apply, "TILE", 1 << 14)
    if misled:
        original = kernels.sample_windows

        def mislead(*arguments):
            state = original(*arguments)
            state[2].fill_(77)
            state[3].fill_(1)
            return state

        monkeypatch.setattr(kernels, "sample_windows", mislead)
    generator = torch.Generator().manual_seed(0)
    grads = [
        (torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()).to(dtype)
        for n in (150_001, 3, 40_000)
    ]
    grads[0] = grads[0][1:]  # not at a multiple of 16 bytes, as in a flat buffer
    for scope in ("tensor", "global"):
        wanted = full_sort.mask(grads, 0.2, scope)
        parameters = parameters_with([grad.clone() for grad in grads])
        parameters[0].grad = torch.cat([grads[0][:1], grads[0]])[1:]
        mask_grads_(parameters, 0.2, scope=scope)
        for p, want in zip(parameters, wanted, strict=True):
            assert full_sort.same_bits(p.grad, want)
    assert on_kernels["kth_largest"] == on_kernels["apply_thresholds_"] == 2


@pytest.mark.parametrize("scope, bad", [("tensor", math.nan), ("global", math.inf)])
def test_nonfinite_gradient_is_named(small, bad, scope):
    for dtype in DTYPES:
        parameters = parameters_with([torch.ones(5, dtype=dtype), torch.ones(300, dtype=dtype)])
        parameters[1].grad[-3] = bad
        with pytest.raises(RuntimeError, match="'parameter 1' holds NaN or infinity"):
            mask_grads_(parameters, 0.2, scope=scope)
        assert parameters[0].grad.sum() == 5


def test_nans_of_different_bits_rank_alike(small):
    for dtype in DTYPES:
        bits = torch.arange(NAN_BITS[dtype], NAN_BITS[dtype] + 9)
        (p,) = parameters_with([from_bits(bits, dtype)])
        statistics = mask_grads_(p, 0.2, error_if_nonfinite=False)
        assert torch.equal(p.grad.view(INT_DTYPE[dtype]), bits.to(INT_DTYPE[dtype]))
        assert statistics.thresholds["0"].isnan() and int(statistics.selected["0"]) == 9


class PerColumn(GradientMask):
    def compute_score(self, name, parameter, grad):
        return (grad.float() / (1 + parameter.detach().float().abs())).t().contiguous().t()


@pytest.mark.parametrize(
    "mask_class, score, refresh_every",
    [
        *itertools.product([GradientMask], ["saliency", "random"], [1, 2]),
        *(pytest.param(GradientMask, "magnitude", every, marks=pytest.mark.slow) for every in (1, 2)),
        (PerColumn, "random", 2),  # whichever score is asked for, its own is used
    ],
)
def test_gradient_mask_selects_as_on_the_cpu(mask_class, score, refresh_every, small, monkeypatch, on_kernels):
    def masked_gradients():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 20), torch.nn.Linear(20, 29)).bfloat16()
        mask = mask_class(model.named_parameters(), density=0.3, score=score, refresh_every=refresh_every)
        found = []
        for _ in range(1 + refresh_every):
            model.zero_grad()
            model(torch.randn(8, 16, dtype=torch.bfloat16)).square().mean().backward()
            mask.mask_grads_()
            found += [p.grad.clone() for p in model.parameters()]
            found += mask.statistics.selected.values()
        return found + [bits.clone() for bits in mask.state_dict()["selections"].values()]

    by_kernels = masked_gradients()
    is_drawn = score == "random" and mask_class is GradientMask
    is_kept = refresh_every == 2 and not is_drawn
    wanted = ["apply_random_draws_"] if is_drawn else ["kth_largest", "apply_thresholds_"]
    wanted += ["pack_thresholds", "apply_packed_selections_"] if is_kept else []
    assert {name for name, times in on_kernels.items() if times} == set(wanted)
    monkeypatch.setattr(devices, "_SERVED", ())
    for a, b in zip(by_kernels, masked_gradients(), strict=True):
        assert torch.equal(a, b) if a.dtype in (torch.uint8, torch.int64) else full_sort.same_bits(a, b)


@pytest.mark.parametrize("score", ["magnitude", "saliency"])
@pytest.mark.parametrize("refresh_every", [1, 2])
def test_searching_packing_and_applying_share_a_table(score, refresh_every, small, monkeypatch):
    """Also where each parameter has an optimizer of its own, as with the optimizer in backward."""
    made = []
    monkeypatch.setattr(kernels, "make_table", lambda *given: made.append(given) or tables.make_table(*given))
    model = torch.nn.Linear(20, 15).bfloat16()
    mask = GradientMask(model.named_parameters(), density=0.2, score=score, refresh_every=refresh_every)
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)
        mask.register(optimizer)
        for step in (1, 2):
            p.grad = torch.randn_like(p)
            optimizer.step()
            assert len(made) == 1, step
            made.clear()


@FIXTURE
@hypothesis.given(grads=st.lists(tensors(300), min_size=1, max_size=3), density=densities)
def test_packed_selections_and_draws_equal_those_of_torch(small, grads, density):
    """Bits, entries and counts, also of NaN and of tensors with gaps, which fall back."""
    parts = [part_of(clone_with_strides(grad)) for grad in grads]
    selections = select_largest(parts, [part.local for part in parts], density)
    packed = selection.pack(selections, [None] * len(parts))
    for one, chosen in zip(packed, selections, strict=True):
        assert torch.equal(one.bits, chosen.pack().bits)
    places = (0, 2**32 - 100)  # of an entry in a larger parameter
    for together in (packed, *([Shifted(p, density, 2**63 + 5, place) for p in parts] for place in places)):
        copies = [part_of(clone_with_strides(grad)) for grad in grads]
        counts = selection.apply_(copies, together)
        for grad, copy, one, stayed in zip(grads, copies, together, counts, strict=True):
            wanted = clone_with_strides(grad)
            assert int(one.apply_(wanted)) == int(stayed)
            assert full_sort.same_bits(copy.grad, wanted)


class Shifted(selection.RandomSelection):
    """Of a part that begins somewhere in its parameter."""

    def __init__(self, part, density, key, place):
        super().__init__(part, density, key)
        self.place = place

    def _offset(self):
        return self.place


def test_more_than_two_billion_entries_are_addressed():
    """The last chunks of a tensor whose offsets do not fit 32 bits; the memory before them is never touched."""
    n = 2**32 + 1000
    tensor = torch.from_numpy(numpy.zeros(n, dtype=numpy.int16)).view(torch.bfloat16)
    tensor[-1500:] = torch.arange(1500).to(torch.bfloat16)
    table = tables.make_table([[tensor]])
    skipped = table.chunk_tensors.numel() - 2
    table.chunk_tensors = table.chunk_tensors[skipped:]
    table.first_chunks -= skipped
    smallest = torch.tensor([1000.0]).bfloat16().view(torch.int16).int()
    wanted = tensor[-1500:].clone()
    wanted[wanted < 1000] = 0
    selected = apply.apply_smallest_(table, smallest)
    assert int(selected) == int((wanted != 0).sum()) and torch.equal(tensor[-1500:], wanted)
    counts, largest = torch.zeros(1, 32, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    state = tuple(torch.tensor([value]) for value in (0, 0x7F82, 1, 10))
    count.count_in_windows(table, state, counts, largest)
    assert int(counts[0, 1:].sum()) == int((wanted.view(torch.int16) > 1 << 10).sum())
    assert int(largest) == int(wanted.view(torch.int16).max())
