"""What is selected equals what a full sort selects, bit for bit, whatever the entries and however they lie."""

import math
import subprocess
import sys
import textwrap

import full_sort
import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from gmt_tune import kth_largest_magnitude, mask_grads_
from gmt_tune.masking.bits import INT_DTYPE, NAN_BITS, from_bits, magnitude_bits
from gmt_tune.masking.parts import part_of
from gmt_tune.masking.scores import entries_to_keep, select_largest
from gmt_tune.masking.search import cpu as cpu_search
from gmt_tune.masking.search import digits
from gmt_tune.masking.selection import ThresholdSelection, apply_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e-45, -1e-40, 6e-8, 1.2e-38, 3.4e38, 65504.0]

hypothesis.settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("here")


@pytest.fixture
def small_blocks(monkeypatch):
    """Lets a few hundred entries take the ways that otherwise millions take."""
    for name, value in dict(FEW=8, BLOCK=256, ROW=64, SAMPLE=32, LARGE_SAMPLE=128, PIECE=64, BATCH=3).items():
        monkeypatch.setattr(cpu_search, name, value)


@st.composite
def tensors(draw, max_size=700):
    """Entries that make trouble: ties, zeros, subnormals, infinities, NaN; in every layout."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, max_size)),
            st.tuples(st.integers(1, 20), st.integers(1, max_size // 20)),
            st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, max_size // 64)),
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "any bits", "few values", "special", "zero rows", "constant"]))
    if kind == "normal":
        scale = draw(st.sampled_from([1.0, 1e-4, 1e-37, 1e30]))
        values = torch.randn(shape, generator=generator) * scale
    elif kind == "any bits":
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
        values = bits.to(torch.int32).view(torch.float32)
    elif kind == "few values":
        values = torch.randint(-3, 4, shape, generator=generator) * 0.1
    elif kind == "special":
        values = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=generator)]
    elif kind == "zero rows":
        values = torch.randn(shape, generator=generator)
        values *= torch.rand(shape[:1], generator=generator).lt(0.1).view(-1, *[1] * (len(shape) - 1))
    else:
        values = torch.full(shape, draw(st.sampled_from(SPECIAL)))
    values = values.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "reversed dims", "offset"]))
    if layout == "transposed" and len(shape) > 1:
        values = values.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":
        wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
        wide[..., ::2] = values
        values = wide[..., ::2]
    elif layout == "reversed dims":
        values = values.permute(*reversed(range(len(shape)))).contiguous().permute(*reversed(range(len(shape))))
    elif layout == "offset":
        values = torch.cat([torch.zeros(1, dtype=dtype), values.reshape(-1)])[1:].view(shape)
    return values


densities = st.one_of(st.sampled_from([1e-9, 0.01, 0.2, 0.3, 0.5, 0.999]), st.floats(1e-6, 1.0, exclude_max=True))


def parameters_with(grads):
    parameters = []
    for grad in grads:
        parameters.append(torch.nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)))
        parameters[-1].grad = grad
    return parameters


def clone_with_strides(tensor):
    """A copy of the same layout where that matters to the code under test."""
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    return copy.copy_(tensor)


# ------------------------------------------------------------------ the threshold


@hypothesis.given(tensor=tensors(), data=st.data())
def test_threshold_equals_full_sort(tensor, data):
    k = data.draw(st.one_of(st.just(1), st.just(tensor.numel()), st.integers(1, tensor.numel())))
    threshold = kth_largest_magnitude(tensor, k)
    assert threshold.dim() == 0 and threshold.dtype == tensor.dtype
    wanted = full_sort.kth_largest([tensor], k).to(tensor.dtype)
    assert full_sort.same_bits(threshold, wanted) or (threshold.isnan() and wanted.isnan())


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=300)
@hypothesis.given(tensor=tensors(), data=st.data())
def test_threshold_equals_full_sort_on_the_ways_of_large_tensors(small_blocks, tensor, data):
    k = data.draw(st.integers(1, tensor.numel()))
    threshold = kth_largest_magnitude(tensor, k)
    wanted = full_sort.kth_largest([tensor], k).to(tensor.dtype)
    assert full_sort.same_bits(threshold, wanted) or (threshold.isnan() and wanted.isnan())


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(tensor=tensors(), data=st.data())
def test_threshold_is_exact_however_bad_the_guess(small_blocks, tensor, data):
    guesses = [cpu_search.Guess(data.draw(st.integers(0, 2**15 - 1)), data.draw(st.floats(-10, 1e6))) for _ in range(2)]
    k = data.draw(st.integers(1, tensor.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_search, "guess_keys", lambda entries, ks: guesses[:1])
        patch.setattr(cpu_search, "_guess_from_sample", lambda *args: guesses[1])
        threshold = kth_largest_magnitude(tensor, k)
    wanted = full_sort.kth_largest([tensor], k).to(tensor.dtype)
    assert full_sort.same_bits(threshold, wanted) or (threshold.isnan() and wanted.isnan())


@hypothesis.given(tensor=tensors(), data=st.data())
def test_threshold_by_digits_equals_full_sort(tensor, data):
    """The way taken on devices without a faster one, and by shards."""
    k = data.draw(st.integers(1, tensor.numel()))
    bits = digits.kth_bits(lambda: [tensor], k, tensor.dtype)
    threshold, wanted = from_bits(bits, tensor.dtype), full_sort.kth_largest([tensor], k).to(tensor.dtype)
    assert full_sort.same_bits(threshold, wanted) or (threshold.isnan() and wanted.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4096, 4097, 16384, 300_001, 1 << 20, (1 << 20) + 1, 3_000_003])
def test_threshold_equals_full_sort_at_every_size(dtype, n):
    generator = torch.Generator().manual_seed(n)
    tensor = (torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()).to(dtype)
    order = tensor.abs().sort(descending=True).values
    for k in (1, 2, n // 1000, n // 5, n - 1, n):
        assert full_sort.same_bits(kth_largest_magnitude(tensor, k), order[k - 1])


@pytest.mark.parametrize("value", [0.1, 1e-41, 3.0])
def test_threshold_among_many_ties(value):
    """More ties than can be gathered: they are counted instead."""
    tensor = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)) * 1e-6
    tensor[::2] = value
    order = tensor.abs().sort(descending=True).values
    for k in (1, 400_000, 1_000_000, 1_000_001, 1_999_999):
        assert full_sort.same_bits(kth_largest_magnitude(tensor, k), order[k - 1])


def test_k_outside_of_the_tensor_is_refused():
    for k in (0, 5):
        with pytest.raises(ValueError, match=r"between 1 and the number of entries \(4\)"):
            kth_largest_magnitude(torch.ones(4), k)


def test_k_is_the_floor_of_the_rounded_product():
    assert [entries_to_keep(n, d) for n, d in [(1, 0.2), (10, 0.3), (100, 0.29), (5, 1.0)]] == [1, 3, 28, 5]


# ------------------------------------------------------------------ the mask


@hypothesis.given(grads=st.lists(tensors(300), min_size=1, max_size=4), density=densities, data=st.data())
def test_mask_equals_full_sort(grads, density, data):
    scope = data.draw(st.sampled_from(["tensor", "global"]))
    wanted = full_sort.mask(grads, density, scope)
    parameters = parameters_with([clone_with_strides(grad) for grad in grads])
    statistics = mask_grads_(parameters, density, scope=scope, error_if_nonfinite=False)
    for i, (p, want) in enumerate(zip(parameters, wanted, strict=True)):
        assert full_sort.same_bits(p.grad, want)
        assert int(statistics.selected[str(i)]) == int((want != 0).sum())


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(grads=st.lists(tensors(), min_size=1, max_size=3), density=densities, data=st.data())
def test_mask_equals_full_sort_on_the_ways_of_large_tensors(small_blocks, grads, density, data):
    scope = data.draw(st.sampled_from(["tensor", "global"]))
    wanted = full_sort.mask(grads, density, scope)
    parameters = parameters_with([clone_with_strides(grad) for grad in grads])
    statistics = mask_grads_(parameters, density, scope=scope, error_if_nonfinite=False)
    for i, (p, want) in enumerate(zip(parameters, wanted, strict=True)):
        assert full_sort.same_bits(p.grad, want)
        assert int(statistics.selected[str(i)]) == int((want != 0).sum())


@hypothesis.given(grads=st.lists(tensors(300), min_size=1, max_size=3), density=densities, data=st.data())
def test_mask_by_saliency_equals_full_sort(grads, density, data):
    scope = data.draw(st.sampled_from(["tensor", "global"]))
    parameters = parameters_with([clone_with_strides(grad) for grad in grads])
    for p in parameters:
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    scores = [grad * p.detach() for grad, p in zip(grads, parameters, strict=True)]
    wanted = full_sort.mask(grads, density, scope, scores)
    mask_grads_(parameters, density, scope=scope, score="saliency", error_if_nonfinite=False)
    for p, want in zip(parameters, wanted, strict=True):
        assert full_sort.same_bits(p.grad, want)


@hypothesis.given(score=tensors(300), data=st.data())
def test_threshold_of_a_wider_dtype_is_not_rounded(score, data):
    """A bfloat16 entry just below a float32 threshold must not be selected by rounding that down."""
    near = data.draw(st.sampled_from(score.reshape(-1).tolist()))
    hypothesis.assume(math.isfinite(near))
    threshold = from_bits((magnitude_bits(torch.tensor(near)) + data.draw(st.integers(-1, 1))).clamp(0), torch.float32)
    wanted = full_sort.selected(score, threshold)
    assert torch.equal(ThresholdSelection(score, threshold).mask(), wanted)
    grad = clone_with_strides(score)
    (count,) = apply_([part := part_of(grad)], [ThresholdSelection(part.local, threshold)])
    assert full_sort.same_bits(grad, torch.where(wanted, score, 0)) and count == wanted.sum()


def smollm2_like_gradients(dtype, scale):
    """Row scales are log-normal, and most rows of the embedding get no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(49152 // scale, 576), (576, 576), (192, 576), (1536, 576), (576, 1536), (576,)]
    for shape in shapes:
        grad = torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp().view(
            -1, *[1] * (len(shape) - 1)
        )
        if shape == shapes[0]:
            grad *= torch.rand(shape[0], 1, generator=generator) < 0.25
        yield (grad * 1e-4).to(dtype)


@pytest.mark.parametrize("scale", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_of_realistic_gradients_equals_full_sort(dtype, scope, scale):
    grads = list(smollm2_like_gradients(dtype, scale))
    wanted = full_sort.mask(grads, 0.2, scope)
    parameters = parameters_with([grad.clone() for grad in grads])
    mask_grads_(parameters, 0.2, scope=scope)
    for p, want in zip(parameters, wanted, strict=True):
        assert full_sort.same_bits(p.grad, want)


def test_large_embedding_with_mostly_zero_rows_keeps_what_is_not_zero():
    for dtype in DTYPES:
        grad = torch.zeros(4000, 576, dtype=dtype)
        grad[::20] = torch.randn(200, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
        grad[1] = -0.0
        (p,) = parameters_with([grad.clone()])
        statistics = mask_grads_(p, 0.2)
        assert torch.equal(p.grad, grad) and statistics.thresholds["0"] == 0
        assert int(statistics.selected["0"]) == int((grad != 0).sum())


def test_measuring_tells_how_many_the_applying_selects():
    grads = list(smollm2_like_gradients(torch.float32, 32))
    selections = select_largest([part_of(grad) for grad in grads], grads, 0.1)
    assert [int(s.count) for s in selections] == [int(s.mask().sum()) for s in selections]


# ------------------------------------------------------------------ what it leaves alone, and refuses


def test_density_one_changes_no_bit():
    grad = torch.tensor([-0.0, 0.0, 1e-45, -2.0])
    (p,) = parameters_with([grad.clone()])
    assert mask_grads_(p, 1).density == 1.0
    assert full_sort.same_bits(p.grad, grad)


def test_tensors_without_entries_or_gradient_are_passed_over():
    parameters = parameters_with([torch.zeros(0), torch.ones(3, 0), torch.tensor(2.0), torch.tensor([3.0, 1.0])])
    parameters.append(torch.nn.Parameter(torch.ones(2)))
    for scope in ("tensor", "global"):
        statistics = mask_grads_(parameters, 0.5, scope=scope)
        assert list(statistics.selected) == ["0", "1", "2", "3"]
    assert parameters[2].grad == 0.0 or parameters[2].grad == 2.0
    assert mask_grads_([], 0.5).density == 1.0
    assert mask_grads_(parameters[:2], 0.5, scope="global").density == 1.0


def test_gradients_that_are_views_or_require_gradients_are_masked_in_place():
    storage = torch.arange(12.0, requires_grad=True) * 1.0
    p = torch.nn.Parameter(torch.zeros(3, 4))
    p.grad = storage.view(3, 4).detach().requires_grad_()
    mask_grads_(p, 0.25)
    assert storage.tolist() == [0] * 9 + [9, 10, 11]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("score", ["magnitude", "saliency", "random"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [10, 20_000, 1_100_000])
def test_nonfinite_gradient_is_refused_before_any_changes(dtype, bad, score, scope, n):
    grads = [torch.ones(5, dtype=dtype), torch.arange(n).to(dtype).clamp(max=100), torch.zeros(3, dtype=dtype)]
    grads[1][n - 2] = bad
    parameters = parameters_with([grad.clone() for grad in grads])
    with pytest.raises(RuntimeError, match=r"'parameter 1' holds NaN or infinity.*error_if_nonfinite"):
        mask_grads_(parameters, 0.2, scope=scope, score=score)
    for p, grad in zip(parameters, grads, strict=True):
        assert full_sort.same_bits(p.grad, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_finite_values_are_not_taken_for_infinity(dtype):
    """Neither where their sum overflows nor where they round to infinity in fewer bits."""
    for n in (100, 10_000):
        (p,) = parameters_with([torch.full((n,), torch.finfo(dtype).max, dtype=dtype)])
        for score in ("magnitude", "random"):
            mask_grads_(p, 0.5, score=score)


def test_nan_passes_through_where_the_user_asks_for_it():
    (p,) = parameters_with([torch.tensor([1.0, math.nan, -3.0, 2.0])])
    statistics = mask_grads_(p, 0.5, error_if_nonfinite=False)
    assert p.grad[1].isnan() and p.grad[[0, 2, 3]].tolist() == [0, -3, 0]
    assert statistics.thresholds["0"] == 3 and int(statistics.selected["0"]) == 2
    (p,) = parameters_with(
        [from_bits(torch.arange(NAN_BITS[torch.float32], NAN_BITS[torch.float32] + 9), torch.float32)]
    )
    statistics = mask_grads_(p, 0.2, error_if_nonfinite=False)
    assert p.grad.isnan().all() and int(statistics.selected["0"]) == 9


@pytest.mark.parametrize(
    "density, hint",
    [(0, "0"), (-0.1, "-0.1"), (1.5, "1.5"), (20, "20 percent write 0.2"), ("0,2", "'0,2'"), (True, "True"),
     (math.nan, "nan"), (None, "None"), ([0.2], r"\[0.2\]")],
)  # fmt: skip
def test_wrong_density_is_refused_with_the_way_out(density, hint):
    with pytest.raises(ValueError, match=f"density must be a number above 0 and at most 1.*{hint}"):
        mask_grads_([], density)


def test_wrong_words_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="scope must be one of tensor, global, got 'layer'"):
        mask_grads_([], 0.2, scope="layer")
    with pytest.raises(ValueError, match="score must be one of magnitude, saliency, random, got 'movement'"):
        mask_grads_([], 0.2, score="movement")
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, got torch.float64"):
        mask_grads_(parameters_with([torch.ones(3, dtype=torch.float64)]), 0.2)
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        mask_grads_(embedding.parameters(), 0.2)


def test_random_numbers_of_the_training_are_left_alone():
    parameters = parameters_with([torch.randn(2000, 1000), torch.randn(70, 300)])
    state = torch.get_rng_state()
    for score in ("magnitude", "saliency", "random"):
        mask_grads_(parameters, 0.3, score=score)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("score", ["magnitude", "saliency", "own", "random", "refresh"])
def test_a_step_needs_little_memory(score):
    """At most 1/16 of the largest tensor's bytes and a few MB, seen from outside of the process.

    A user's own score is made by the user, a tensor at a time: it is the only tensor of that size. A selection that
    outlives the step is 1 bit per entry.
    """
    program = """
        import resource, sys, torch
        from gmt_tune import GradientMask
        dtype, score = getattr(torch, sys.argv[1]), sys.argv[2]
        class Own(GradientMask):
            def compute_score(self, name, parameter, grad):
                return grad.neg()
        def parameter(n):
            p = torch.nn.Parameter(torch.ones(n, dtype=dtype))
            p.grad = torch.ones(n, dtype=dtype).mul_(1e-3)
            for part in p.grad.split(1 << 20):
                part.mul_(torch.randn(part.shape))
            return p
        def mask_of(parameters):
            named = [(str(i), p) for i, p in enumerate(parameters)]
            known = "magnitude" if score in ("own", "refresh") else score
            refresh_every = 2 if score == "refresh" else 1
            return (Own if score == "own" else GradientMask)(named, 0.2, score=known, refresh_every=refresh_every)
        mask = mask_of([parameter(1 << 26)])
        mask_of([parameter(10_000), parameter(3_000_000)]).mask_grads_()   # first use of everything
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mask.mask_grads_()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    n = 1 << 26
    for dtype in (torch.bfloat16, torch.float32) if score == "magnitude" else (torch.bfloat16,):
        command = [sys.executable, "-c", textwrap.dedent(program), str(dtype).removeprefix("torch."), score]
        extra_kb = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        kept = {"own": n * dtype.itemsize, "refresh": n / 8}.get(score, 0)
        assert extra_kb * 1024 <= n * dtype.itemsize / 16 + 6e6 + kept, (dtype, extra_kb)


def test_bits_cover_all_dtypes():
    assert set(INT_DTYPE) == set(DTYPES)
