"""A plain loop with CompactAdamW that was saved and goes on: the same weights, bit for bit, or one sentence."""

import io

import pytest
import torch
from torch import nn

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.optim.states import to_floats

REFRESH = 3


class Loop:
    """A model in training, whose state is all that torch.save and torch.load keep of it."""

    def __init__(self, state_bits=32, **mask):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(130, 96), nn.Tanh(), nn.Linear(96, 130)).bfloat16()
        mask = {"density": 0.5, "refresh_every": REFRESH, "dense": ["*bias"], **mask}
        self.mask = GradientMask(self.model.named_parameters(), **mask)
        self.optimizer = CompactAdamW(
            self.model.parameters(), lr=1e-2, state_bits=state_bits, bf16_stochastic_round=True, max_grad_norm=1.0
        )
        self.mask.register(self.optimizer)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for micro_batch in range(2):
                torch.manual_seed(10 * step + micro_batch)
                x = torch.randn(8, 130, dtype=torch.bfloat16)
                (self.model(x) - x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({name: getattr(self, name).state_dict() for name in ("model", "mask", "optimizer")}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO, names: tuple[str, ...]) -> None:
        states = torch.load(file, weights_only=True)
        for name in names:
            getattr(self, name).load_state_dict(states[name])

    def everything(self) -> dict[str, torch.Tensor]:
        states = self.optimizer.state_dict()["state"]
        found = {f"{number} {key}": to_floats(states[number][key]) for number in states for key in states[number]}
        bits = {f"{name} selected": bits for name, bits in self.mask.state_dict()["selections"].items()}
        return found | bits | self.model.state_dict()


@pytest.mark.parametrize(
    ("state_bits", "at_step", "names"),
    [
        (32, 1, ("model", "mask", "optimizer")),  # before the second layer's first turn
        (32, 4, ("optimizer", "mask", "model")),  # between two turns of each
        (8, 1, ("optimizer", "model", "mask")),
        (8, 4, ("model", "mask", "optimizer")),
        (4, 4, ("model", "mask", "optimizer")),
        ("fp8", 4, ("model", "mask", "optimizer")),
    ],
    ids=str,
)
def test_a_plain_loop_goes_on_bit_for_bit(state_bits, at_step, names):
    straight, before, after = Loop(state_bits), Loop(state_bits), Loop(state_bits)
    straight.train(0, 8)
    before.train(0, at_step)
    after.load(before.saved(), names)
    after.train(at_step, 8)
    found, wanted = after.everything(), straight.everything()
    assert found.keys() == wanted.keys() and len(wanted) == 4 * 3 + 2 + 4
    for key in wanted:
        assert found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]), key
    kinds = [type(state["exp_avg"]).__name__ for state in after.optimizer.state.values() if "age" in state]
    assert kinds == 2 * [{32: "Tensor", 8: "OptimState8bit", 4: "OptimState4bit", "fp8": "OptimStateFp8"}[state_bits]]


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (("mask",), {}),
        (("optimizer",), {}),
        (("mask", "optimizer"), {"state_bits": 8}),
        (("optimizer",), {"density": 0.4}),
    ],
    ids=str,
)
def test_states_that_are_not_of_the_selection_are_one_sentence_before_any_weight_changes(names, changes):
    before, after = Loop(), Loop(**changes)
    before.train(0, 4)
    after.load(before.saved(), names)
    weights = [p.clone() for p in after.model.parameters()]
    with pytest.raises(RuntimeError, match=r"states of '\d.weight' are not those of the entries that the mask selects"):
        after.train(4, 5)
    assert all(torch.equal(p, old) for p, old in zip(after.model.parameters(), weights, strict=True))


@pytest.mark.parametrize(("then", "now"), [(4, 8), ("fp8", 32)])
def test_states_in_other_bits_are_one_sentence(then, now):
    before, after = Loop(then), Loop(now)
    before.train(0, 4)
    with pytest.raises(ValueError, match=f"has state_bits {now!r}, .* set state_bits as it was"):
        after.load(before.saved(), ("optimizer",))


def test_states_of_adamw_are_one_sentence():
    loop = Loop()
    adamw = torch.optim.AdamW(loop.model.parameters())
    loop.model(torch.randn(8, 130, dtype=torch.bfloat16)).sum().backward()
    adamw.step()
    loop.optimizer.zero_grad()
    loop.optimizer.load_state_dict(adamw.state_dict())
    with pytest.raises(RuntimeError, match=r"states of '\d.weight' are not those of the entries that the mask selects"):
        loop.train(0, 1)


def test_states_that_were_emptied_begin_with_a_new_mask():
    loop = Loop()
    loop.train(0, 4)
    other = Loop(density=0.4)
    other.load(loop.saved(), ("model", "optimizer"))
    other.optimizer.state.clear()
    other.train(4, 8)
    assert all(torch.isfinite(p).all() for p in other.model.parameters())
