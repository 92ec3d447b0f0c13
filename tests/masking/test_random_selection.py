"""The random score: any entry's lot depends on its index and the key alone, and lots look random."""

import full_sort
import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from gmt_tune import mask_grads_
from gmt_tune.masking import draws as module
from gmt_tune.masking.draws import apply_random_, random_key, random_selection

KEY = random_key(0, 0, "layers.0.weight")


@pytest.mark.parametrize("density", [1e-6, 0.01, 0.2, 0.9])
def test_fraction_that_stays_is_the_density(density):
    n = 2_000_000
    for key in (KEY, random_key(1, 0, "a"), 0, 2**64 - 1):
        kept = int(random_selection(0, n, density, key).sum())
        assert abs(kept - density * n) < 5 * (density * (1 - density) * n) ** 0.5 + 1


def test_density_one_keeps_all():
    assert random_selection(0, 1000, 1.0, KEY).all()


def test_neighbouring_entries_rows_and_draws_are_independent():
    n = 1 << 20
    a = random_selection(0, n, 0.3, KEY).float() - 0.3
    others = [random_selection(0, n, 0.3, random_key(0, draw, "layers.0.weight")).float() - 0.3 for draw in (1, 2)]
    others.append(random_selection(0, n, 0.3, random_key(1, 0, "layers.0.weight")).float() - 0.3)
    others.append(random_selection(0, n, 0.3, random_key(0, 0, "layers.1.weight")).float() - 0.3)
    others.append(random_selection(0, n, 0.3, KEY ^ 1).float() - 0.3)
    others.append(random_selection(0, n, 0.3, KEY ^ (1 << 63)).float() - 0.3)
    others += [random_selection(lag, n + lag, 0.3, KEY).float() - 0.3 for lag in (1, 2, 3, 64, 576, 4096, 1 << 16)]
    others.append(random_selection(1 << 32, (1 << 32) + n, 0.3, KEY).float() - 0.3)
    for other in others:
        correlation = float((a * other).mean()) / (0.3 * 0.7)
        assert abs(correlation) < 5 / n**0.5


@hypothesis.settings(deadline=None, max_examples=50, derandomize=True)
@hypothesis.given(
    start=st.one_of(st.integers(0, 10**7), st.integers(2**32 - 500, 2**32), st.integers(2**31 - 500, 2**31)),
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=4),
)
def test_shards_draw_what_the_whole_draws(start, lengths):
    whole = random_selection(start, start + sum(lengths), 0.4, KEY)
    parts = []
    for length in lengths:
        parts.append(random_selection(start, start + length, 0.4, KEY))
        start += length
    assert torch.equal(torch.cat(parts), whole)


def test_scratch_size_decides_nothing(monkeypatch):
    whole = random_selection(5, 3000, 0.4, KEY)
    monkeypatch.setattr(module, "CHUNK", 64)
    assert torch.equal(random_selection(5, 3000, 0.4, KEY), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_layout_loses_the_same_entries(dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)
    grad = torch.randn(30, 50).to(dtype)
    grad[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    kept = random_selection(700, 700 + grad.numel(), 0.3, KEY).view(30, 50)
    wanted = torch.where(kept, grad, torch.zeros_like(grad))
    for copy in (grad.clone(), grad.t().contiguous().t(), torch.stack([grad, grad], 2)[..., 0]):
        count = apply_random_(copy, 0.3, KEY, offset=700)
        assert full_sort.same_bits(copy, wanted)
        assert count.dtype == torch.int64 and int(count) == int(kept.sum())


def test_mask_draws_anew_for_each_step_and_seed():
    def masked(**keywords):
        p = torch.nn.Parameter(torch.zeros(2000))
        p.grad = torch.ones(2000)
        mask_grads_(p, 0.5, score="random", **keywords)
        return p.grad

    assert torch.equal(masked(), masked(seed=0, step=0))
    assert not torch.equal(masked(), masked(step=1)) and not torch.equal(masked(), masked(seed=1))
