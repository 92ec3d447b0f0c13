"""Wrappers do not change a parameter's name, so neither patterns, saved states nor random selections."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

from gmt_tune import GradientMask
from gmt_tune.masking.names import bare_name, bare_names
from gmt_tune.masking.tracker import SelectionTracker


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 4))


class Holding(nn.Module):
    """What a wrapper looks like that is not installed here: one module under the wrapper's own attribute."""

    def __init__(self, attribute: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(attribute, model)

    def forward(self, *args):
        return next(self.children())(*args)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compile": torch.compile,
    "checkpoint_wrapper": lambda model: nn.Sequential(*map(checkpoint_wrapper, model)),
    "offload_wrapper": lambda model: nn.Sequential(*map(offload_wrapper, model)),
    "Fabric": lambda model: Holding("_forward_module", model),
    "DeepSpeed's engine": lambda model: Holding("module", model),
    "PyTorch/XLA": lambda model: Holding("_orig_module", model),
    "TorchRec": lambda model: Holding("_dmp_wrapped_module", Holding("module", model)),
    "DDP over compile": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    "Fabric over DDP": lambda model: Holding("_forward_module", nn.parallel.DistributedDataParallel(model)),
    "AveragedModel over DDP": lambda model: AveragedModel(nn.parallel.DistributedDataParallel(model)),
}


def select(model: nn.Module) -> tuple[dict, list[torch.Tensor]]:
    """The state of a mask after a step with patterns and the random score, and which entries it left."""
    mask = GradientMask(model.named_parameters(), density=0.4, score="random", dense=["1.*"], refresh_every=3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    mask.mask_grads_()
    return mask.state_dict(), [p.grad != 0 for p in model.parameters()]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_has_the_names_patterns_state_and_random_selection_of_the_bare_one(one_process, wrapper):
    state, kept = select(make_model())
    wrapped = WRAPPERS[wrapper](make_model())
    assert [name for name, _ in wrapped.named_parameters()] != [name for name, _ in make_model().named_parameters()]
    wrapped_state, wrapped_kept = select(wrapped)
    assert wrapped_state == state and list(state["steps"]) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(kept) == len(wrapped_kept) == 6
    for a, b in zip(kept, wrapped_kept, strict=True):
        assert torch.equal(a, b)


def test_a_wrapped_part_of_a_model_has_bare_names_too():
    model = nn.ModuleDict({"encoder": nn.DataParallel(make_model()), "head": torch.compile(nn.Linear(4, 2))})
    names = bare_names([name for name, _ in model.named_parameters()])
    assert names[0] == "encoder.0.weight" and names[-1] == "head.bias"


@pytest.mark.parametrize(
    "names",
    [
        ["module.weight", "other.weight"],  # a model's own part
        ["layers.0.module.weight", "layers.0.gate"],
        ["my_orig_mod.weight", "a.module_list.0.weight"],
        ["weight", "bias"],
        ["module"],
    ],
)
def test_what_no_wrapper_put_there_stays(names):
    assert bare_names(names) == names
    assert [bare_name(name) for name in names] == names


def test_states_load_across_wrappers_and_from_names_that_an_earlier_release_saved():
    model = make_model()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    mask = GradientMask(model.named_parameters(), density=0.2, refresh_every=None)
    mask.mask_grads_()
    state = mask.state_dict()
    old = copy.deepcopy(state) | {
        key: {f"module.{name}": value for name, value in state[key].items()} for key in ("steps", "selections")
    }
    del old["shards"]
    for given in (state, old):
        wrapped = GradientMask(nn.DataParallel(make_model()).named_parameters(), density=0.2, refresh_every=None)
        wrapped.load_state_dict(given)
        loaded = wrapped.state_dict()
        assert loaded["steps"] == state["steps"] and loaded["selections"].keys() == state["selections"].keys()
        for name, bits in state["selections"].items():
            assert torch.equal(loaded["selections"][name], bits)


class HasModule(nn.Module):
    """A model with a part of its own that is called as wrappers call what they wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.head = nn.Linear(20, 10), nn.Linear(10, 5)


@pytest.mark.parametrize("policy", [{"dense": ["head*"]}, {"frozen": ["head*"]}])
def test_a_models_own_part_called_module_keeps_its_name_in_states(policy):
    masks = [GradientMask(HasModule().named_parameters(), density=0.2, **policy) for _ in range(2)]
    for p in masks[0].masked_parameters.values():
        p.grad = torch.ones_like(p)
    masks[0].mask_grads_()
    masks[1].load_state_dict(masks[0].state_dict())
    assert masks[1].state_dict()["steps"] == {"module.weight": 1, "module.bias": 1}


@pytest.mark.parametrize("pattern", ["2.*", "module.2.*"])
def test_a_pattern_matches_a_name_as_it_is_and_as_it_was_given(pattern):
    mask = GradientMask(nn.DataParallel(make_model()).named_parameters(), density=0.2, dense=[pattern])
    assert mask.masked_parameters.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert mask.policy()["dense"] == [pattern]


def test_a_wrapper_that_changed_random_selections_in_an_earlier_release_is_said():
    mask = GradientMask(make_model().named_parameters(), density=0.2, score="random")
    state = mask.state_dict()
    state["steps"] = {f"module.{name}": count for name, count in state["steps"].items()}
    with pytest.warns(UserWarning, match="from here on, other entries are drawn"):
        mask.load_state_dict(state)


def test_a_trackers_state_loads_from_names_that_an_earlier_release_saved():
    mask = GradientMask(make_model().named_parameters(), density=0.2)
    tracker = SelectionTracker(mask)
    optimizer = torch.optim.SGD(mask.masked_parameters.values(), lr=0.1)
    mask.register(optimizer)
    tracker.register(optimizer)
    for p in mask.masked_parameters.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = tracker.state_dict()
    old = {key: {f"module.{n}": v for n, v in state[key].items()} for key in ("calls", "last", "ever")}
    other = SelectionTracker(GradientMask(make_model().named_parameters(), density=0.2))
    other.load_state_dict(old)
    assert other.state_dict()["calls"] == state["calls"] and state["calls"]["0.weight"] == 1
    old["last"]["module.0.weight"] = old["last"]["module.0.weight"][:-1]
    with pytest.raises(ValueError, match=r"the saved selection of '0\.weight' does not fit"):
        other.load_state_dict(old)


def test_tied_parameters_under_two_names_count_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "output": nn.Linear(4, 5, bias=False)})
    model["output"].weight = model["embedding"].weight
    mask = GradientMask(model.named_parameters(remove_duplicate=False), density=0.5)
    assert list(mask.masked_parameters) == ["embedding.weight"]


def test_parameters_that_fsdp1_flattened_are_refused(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="flattened by FSDP version 1.*fully_shard"):
        GradientMask(model.named_parameters(), density=0.2)
