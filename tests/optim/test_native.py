"""The C++ update is that of torch's operations."""

import ctypes

import pytest
import torch

from gmt_tune.masking.packing import pack_selection
from gmt_tune.masking.places import Places
from gmt_tune.optim import native, states

GROUP = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def moments_of(size: int, bits: int) -> list[torch.Tensor]:
    return [states.zeros((size,), bits, signed=signed, device=torch.device("cpu")) for signed in (True, False)]


def update_(entries, grads, places, age, exp_avg, exp_avg_sq, stochastic_round=False, group=GROUP) -> bool:
    """Of one tensor: whether it was done."""
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step" if places is None else "age": age}
    return not native.update_([(entries, grads, state, places)], group, stochastic_round=stochastic_round)


@pytest.mark.parametrize("weights_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("n", "density"), [(200_001, 0.05), (100_001, 0.4), (20_000, None), (9, 0.5)])
def test_moments_are_the_same_bit_for_bit(weights_in, gradients_in, bits, n, density):
    torch.manual_seed(0)
    mask = torch.rand(n) < (density or 2)
    places = Places(pack_selection(mask), n) if density else None
    count = int(mask.sum())
    size = states.padded_size(count, bits) if density else n
    weights = torch.randn(n).to(weights_in)
    own, wanted = weights.clone(), weights.clone()
    (m, v), (wanted_m, wanted_v) = moments_of(size, bits), moments_of(size, bits)
    ages = torch.randint(0, 40, (size,)).to(torch.int16) if density else torch.tensor(0.0)
    wanted_ages = ages.clone()
    version = own._version
    for _ in range(3):
        grads = torch.zeros(size, dtype=gradients_in)
        grads[:count] = torch.randn(count) * 10.0 ** torch.randint(-6, 1, (count,))
        wanted_ages += 1
        if not density:
            ages += 1
        assert update_(own, grads, places, ages, m, v)
        some = torch.zeros(size, dtype=weights_in)
        some[:count] = wanted[mask]
        states.adamw_([some], [grads], [wanted_ages], [wanted_m], [wanted_v], GROUP, stochastic_round=False)
        wanted[mask] = some[:count]
    assert torch.equal(ages, wanted_ages) and own._version > version
    for moment, other in ((m, wanted_m), (v, wanted_v)):
        assert (
            torch.equal(states.to_floats(moment), states.to_floats(other)) and states.to_floats(moment).abs().sum() > 0
        )
    assert torch.equal(own[~mask], weights[~mask]) and not torch.equal(own, weights)
    # The corrections of a vector's last entries are computed by another function
    nearest = 2.0**-7 if weights_in == torch.bfloat16 else 1e-6
    torch.testing.assert_close(own, wanted, rtol=nearest, atol=1e-6)


def test_bf16_weights_are_rounded_by_chance():
    n = 1 << 16
    start = torch.full((n,), 1.0, dtype=torch.bfloat16)
    places, group = (
        Places(pack_selection(torch.ones(n, dtype=torch.bool)), n),
        {**GROUP, "weight_decay": 0.0, "lr": 1e-3},
    )

    def updated(seed: int) -> torch.Tensor:
        weights, (m, v) = start.clone(), moments_of(n, 32)
        ages, grads = torch.zeros(n, dtype=torch.int16), torch.ones(n, dtype=torch.bfloat16)
        torch.manual_seed(seed)
        assert update_(weights, grads, places, ages, m, v, True, group)
        return weights

    weights = updated(1)
    assert torch.equal(weights, updated(1)) and not torch.equal(weights, updated(2))
    below = 1.0 - 2.0**-8  # the next bfloat16; the update is by 1e-3, to the nearest it would do nothing
    assert set(weights.float().unique().tolist()) == {below, 1.0}
    assert abs(weights.float().mean() - (1 - 1e-3)) < 5e-5


def test_the_ages_of_long_runs_stay_at_the_largest():
    weights, (m, v) = torch.ones(4), moments_of(4, 32)
    ages = torch.full((4,), torch.iinfo(torch.int16).max, dtype=torch.int16)
    places = Places(pack_selection(torch.ones(4, dtype=torch.bool)), 4)
    assert update_(weights, torch.ones(4), places, ages, m, v)
    assert ages.unique().tolist() == [torch.iinfo(torch.int16).max] and weights.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"entries": torch.ones(8, dtype=torch.float16)},
        {"entries": torch.ones(8, 2)[:, 0]},
        {"entries": torch.ones(8, device="meta")},
        {"age": torch.zeros(8, dtype=torch.int32)},
        {"exp_avg": torch.zeros(8, dtype=torch.bfloat16)},
    ],
)
def test_what_it_cannot_do_it_leaves_alone(changes):
    first, second = moments_of(8, 32)
    given = dict(entries=torch.ones(8), grads=torch.ones(8), age=torch.zeros(8, dtype=torch.int16))
    given |= dict(exp_avg=first, exp_avg_sq=second, places=Places(pack_selection(torch.ones(8, dtype=torch.bool)), 8))
    assert update_(**given)
    first.zero_()
    assert not update_(**{**given, **changes})
    assert first.count_nonzero() == 0


def test_structures_are_as_large_as_those_of_the_source():
    # A field more or less would shift what comes behind it
    assert ctypes.sizeof(native._Group) == 5 * 4 + 4 + 2 * 8
    assert ctypes.sizeof(native._Tensor) == 5 * 8 + 4 * 8 + 2 * 6 * 8 + 2 * 8 + 2 * 4


def test_a_learning_rate_on_a_device_is_not_read_where_c_plus_plus_serves_nothing():
    """Reading it would wait for the device in each step."""
    group = {"lr": torch.tensor(0.1, device="meta"), "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    assert native.update_([], group, stochastic_round=False) == []
    member = (torch.ones(3, device="meta"), torch.ones(3, device="meta"), {"step": torch.ones(())}, None)
    assert native.update_([member], group, stochastic_round=False) == [0]
