"""What a subclass may override besides the score: when selections are made, and who competes with whom."""

import copy
import sys
from pathlib import Path

import full_sort
import numpy as np
import pytest
import torch
from torch import nn

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.masking.parts import own_entries

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from own_rule import OftenFirst  # noqa: E402

DUE = {0, 1, 2, 4, 8, 16}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 8, bias=False))


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def train(model, mask, optimizer, steps):
    """What is selected after each step, by name."""
    seen = []
    for step in steps:
        backward(model, step)
        optimizer.step()
        if isinstance(optimizer, CompactAdamW):
            seen.append({name: mask.selection(p).mask().clone() for name, p in mask.masked_parameters.items()})
        else:
            seen.append({name: own_entries(p.grad) != 0 for name, p in mask.masked_parameters.items()})
        optimizer.zero_grad()
    return seen


def set_up(optimizer_class, mask_class=OftenFirst, **options):
    model = make_model()
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    mask = mask_class(model.named_parameters(), density=0.3, **options)
    mask.register(optimizer)
    return model, mask, optimizer


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, CompactAdamW])
@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_selections_change_at_the_steps_of_the_rule_alone(optimizer_class, score):
    model, mask, optimizer = set_up(optimizer_class, score=score)
    seen = train(model, mask, optimizer, range(18))
    changed = {i for i in range(1, 18) if any(not torch.equal(seen[i][name], seen[i - 1][name]) for name in seen[i])}
    assert changed <= DUE
    assert {1, 2, 4} <= changed and (score == "magnitude" or changed == DUE - {0})


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_stepping_within_the_backward_pass_changes_no_bit(score):
    model, mask, optimizer = set_up(torch.optim.AdamW, score=score)
    train(model, mask, optimizer, range(7))

    in_backward = make_model()
    mask = OftenFirst(in_backward.named_parameters(), density=0.3, score=score)
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in in_backward.parameters()}
    for own in optimizers.values():
        mask.register(own)

    def step_in_backward(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step_in_backward)
    for step in range(7):
        backward(in_backward, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), in_backward.parameters(), strict=True))


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, CompactAdamW])
@pytest.mark.parametrize("score", ["magnitude", "random"])
@pytest.mark.parametrize("stop", [3, 6])
def test_resumed_it_ends_with_the_same_bits(optimizer_class, score, stop):
    model, mask, optimizer = set_up(optimizer_class, score=score)
    train(model, mask, optimizer, range(stop))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), mask.state_dict()])
    train(model, mask, optimizer, range(stop, 11))

    resumed, mask, optimizer = set_up(optimizer_class, score=score)
    for part, state in zip((resumed, optimizer, mask), saved, strict=True):
        part.load_state_dict(state)
    train(resumed, mask, optimizer, range(stop, 11))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_another_rule_is_refused_by_name_in_both_directions():
    model = make_model()
    own = OftenFirst(model.named_parameters(), density=0.3)
    plain = GradientMask(model.named_parameters(), density=0.3)
    with pytest.raises(ValueError, match=r"refreshes is None, was 'own_rule\.OftenFirst\.refreshes'.*start a new run"):
        plain.load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match=r"refreshes is 'own_rule\.OftenFirst\.refreshes', was None"):
        own.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="growth is 3, was 2"):
        OftenFirst(model.named_parameters(), density=0.3, growth=3).load_state_dict(own.state_dict())
    assert plain.policy().keys() == {"score", "density", "scope", "refresh_every", "dense", "frozen", "seed"}


def test_a_compact_optimizer_frees_gradients_between_the_steps_of_the_rule():
    model, mask, optimizer = set_up(CompactAdamW)
    train(model, mask, optimizer, range(3))
    backward(model, 3)  # not due
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    backward(model, 4)  # due
    assert all(p.grad is not None for p in model.parameters())


class ByLayer(GradientMask):
    """All tensors of a layer compete."""

    def scope_of(self, name):
        return name.partition(".")[0]


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({key: nn.Linear(7, 9) for key in ("a", "b", "c")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["magnitude", "saliency"])
def test_a_scope_of_ones_own_is_exact_over_its_tensors(dtype, score):
    model = layers().to(dtype)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn_like(p) * 10 ** (i % 3)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    mask = ByLayer(model.named_parameters(), density=0.2, score=score)
    statistics = mask.mask_grads_()
    for layer in "abc":
        names = [name for name in grads if name.startswith(layer)]
        tensors, weights = [grads[n] for n in names], [model.get_parameter(n).detach() for n in names]
        products = [grad.double() * weight.double() for grad, weight in zip(tensors, weights, strict=True)]
        wanted = full_sort.mask(tensors, 0.2, "global", products if score == "saliency" else None)
        assert all(torch.equal(model.get_parameter(n).grad, w) for n, w in zip(names, wanted, strict=True)), layer
        assert len({statistics.thresholds[n].item() for n in names}) == 1
    assert len({t.item() for t in statistics.thresholds.values()}) == 3


def test_a_scope_of_several_tensors_needs_one_optimizer_with_all_of_them_and_no_compact_one():
    model = layers()
    mask = ByLayer(model.named_parameters(), density=0.2)
    mask.register(torch.optim.SGD(model["a"].parameters(), lr=1.0))  # the whole of a scope
    with pytest.raises(ValueError, match=r"scope 'b' needs one optimizer .* lacks 'b\.bias' \(1 in all\)"):
        mask.register(torch.optim.SGD([model["b"].weight], lr=1.0))
    with pytest.raises(ValueError, match="scope 'a' does not work with CompactAdamW: use scope 'tensor'"):
        ByLayer(model.named_parameters(), density=0.2).register(CompactAdamW(model.parameters()))


class FloatScores(ByLayer):
    def compute_score(self, name, parameter, grad):
        return grad.float() + 0


def test_a_score_and_a_scope_of_ones_own_go_together():
    masked = []
    for mask_class in (ByLayer, FloatScores):
        model = layers()
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        mask_class(model.named_parameters(), density=0.2).mask_grads_()
        masked.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*masked, strict=True))


def test_a_rule_that_answers_neither_yes_nor_no_is_refused():
    class Forgetful(GradientMask):
        def refreshes(self, name, step):
            step % 2 == 0  # noqa: B015

    model, mask, optimizer = set_up(torch.optim.AdamW, Forgetful)
    backward(model, 0)
    with pytest.raises(TypeError, match=r"^refreshes\(\) must return True or False, got None$"):
        for step in range(2):
            backward(model, step)
            optimizer.step()


@pytest.mark.parametrize("value", [{1, 2}, Path("x"), torch.zeros(2), object()], ids=lambda value: type(value).__name__)
def test_a_policy_that_no_checkpoint_can_hold_is_refused_before_training(value):
    class Odd(GradientMask):
        def policy(self):
            return {**super().policy(), "x": value}

    with pytest.raises(TypeError, match=r"^policy\(\) of the gradient mask must give numbers.* under 'x': convert it"):
        set_up(torch.optim.AdamW, Odd)


def test_a_policy_is_saved_in_plain_values(tmp_path):
    class Numbered(GradientMask):
        def policy(self):
            return {**super().policy(), "growth": np.float64(1.5), "sizes": (1, 2)}

    _, mask, _ = set_up(torch.optim.AdamW, Numbered)
    torch.save(mask.state_dict(), tmp_path / "mask.pt")
    mask.load_state_dict(torch.load(tmp_path / "mask.pt", weights_only=True))
