"""Overlap and coverage of selections are those of sets."""

import copy

import pytest
import torch

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.masking.tracker import SelectionTracker


def a_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.ModuleDict({"attn": torch.nn.Linear(7, 9), "mlp": torch.nn.Linear(5, 3)}) for _ in range(3)]
    return torch.nn.ModuleDict({"tok_embeddings": torch.nn.Embedding(11, 4), "layers": torch.nn.ModuleList(layers)})


class Loop:
    """A training loop on random gradients, which remembers as sets what was selected."""

    def __init__(self, every=1, **options):
        self.model = a_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, fused=True)
        self.mask = GradientMask(self.model.named_parameters(), **options)
        self.tracker = SelectionTracker(self.mask, every)
        self.mask.register(self.optimizer)
        self.tracker.register(self.optimizer)
        self.selected = []

    def step(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in self.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        self.optimizer.step()
        names = self.mask.masked_parameters.items()
        self.selected.append({(name, i) for name, p in names for i in p.grad.flatten().nonzero().flatten().tolist()})


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("options", [{"scope": "tensor"}, {"scope": "global"}, {"score": "random"}])
def test_overlap_and_coverage_are_those_of_sets(every, options):
    loop = Loop(every, density=0.2, **options)
    for seed in range(7):
        loop.step(seed)
    seen = loop.selected[::every]
    masked = {(name, i) for name, p in loop.mask.masked_parameters.items() for i in range(p.numel())}
    metrics = loop.tracker.metrics()
    assert metrics["mask/overlap"] == len(seen[-1] & seen[-2]) / len(seen[-2])
    assert metrics["mask/coverage"] == len(set().union(*seen)) / len(masked)
    name = "layers.1.mlp.weight"
    of_name = [{entry for entry in entries if entry[0] == name} for entries in seen]
    detail = loop.tracker.detail()
    if of_name[-2]:
        assert detail["overlap"][name] == len(of_name[-1] & of_name[-2]) / len(of_name[-2])
    assert detail["coverage"][name] == len(set().union(*of_name)) / 15


@pytest.mark.parametrize(("every", "refresh_every"), [(1, 1), (1, 3), (2, 3), (1, None)])
def test_of_a_compact_optimizer_the_entries_that_move_are_counted_and_their_steps(every, refresh_every):
    torch.manual_seed(0)
    model = a_model()
    optimizer = CompactAdamW(model.parameters(), lr=0.1)
    mask = GradientMask(model.named_parameters(), density=0.2, refresh_every=refresh_every, dense=["*bias"])
    tracker = SelectionTracker(mask, every)
    mask.register(optimizer)
    tracker.register(optimizer)
    masked = mask.masked_parameters
    age: dict = {}
    moved_at, found = [], []
    for step in range(8):
        before = {name: p.detach().clone() for name, p in masked.items()}
        sum((p * torch.randn(p.shape)).sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {(n, i) for n, p in masked.items() for i in (p != before[n]).flatten().nonzero().flatten().tolist()}
        age = {entry: age.get(entry, 0) + 1 for entry in moved}
        moved_at.append(moved)
        found.append(tracker.metrics())
        numel = sum(p.numel() for p in masked.values())
        assert mask.metrics()["mask/density"] == len(moved) / numel
        if step % every == 0:
            seen = moved_at[::every]
            assert found[-1]["mask/coverage"] == len(set().union(*seen)) / numel
            assert found[-1]["mask/age"] == sum(age.values()) / len(moved)
            assert step == 0 or found[-1]["mask/overlap"] == len(seen[-1] & seen[-2]) / len(seen[-2])
    assert len({round(metrics["mask/age"], 6) for metrics in found}) > 1 and max(age.values()) > 1


def test_a_selection_that_is_kept_overlaps_wholly_and_covers_its_density():
    loop = Loop(density=0.2, refresh_every=None)
    for seed in range(3):
        loop.step(seed)
    assert loop.tracker.metrics()["mask/overlap"] == 1.0
    assert loop.tracker.metrics()["mask/coverage"] == pytest.approx(loop.mask.metrics()["mask/density"])


def test_tracking_goes_on_from_its_state_as_if_uninterrupted():
    whole, first, second = (Loop(density=0.2) for _ in range(3))
    for seed in range(6):
        whole.step(seed)
    for seed in range(3):
        first.step(seed)
    state = first.tracker.state_dict(copy=True)
    before = copy.deepcopy(state)
    first.step(99)
    assert len(before["ever"]) > 3
    assert all(torch.equal(state["ever"][name], bits) for name, bits in before["ever"].items())
    second.tracker.load_state_dict(state)
    for seed in range(3, 6):
        second.step(seed)
    assert second.tracker.metrics() == whole.tracker.metrics()


def test_a_step_that_an_overflow_skips_is_not_looked_at():
    loop = Loop(density=0.2)
    loop.step(0)
    before = loop.tracker.metrics()
    loop.optimizer.found_inf = torch.ones(())
    loop.step(1)
    assert loop.tracker.metrics() == before


def test_every_must_be_a_number_of_steps():
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="whole number of optimizer steps"):
            SelectionTracker(Loop(density=0.5).mask, wrong)
