"""Saving and restoring what is on CUDA: tensors go to the host and come back to where they were, and never meet."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from fake_cuda.steps import parameters, run

from gmt_tune import CompactAdamW, GradientMask

pytestmark = [pytest.mark.fake_cuda, pytest.mark.filterwarnings("ignore")]


class Store(dict):
    """In place of a checkpoint's files: what was given to be written, by name, as fake tensors on the CPU."""

    def writer(self, monkeypatch):
        from gmt_tune.integrations.torchtune.checkpoint import shards, state

        class Storage:  # innermost: it asks the planner for each tensor, and would write it
            def __init__(storage, folder, **options) -> None: ...
            def set_up_storage_writer(storage, *args) -> None: ...
            def prepare_local_plan(storage, plan):
                return plan

            def prepare_global_plan(storage, plans):
                return plans

            def write_data(storage, plan, planner):
                for item in plan.items:
                    self[item.index.fqn] = planner.resolve_data(item)
                return SimpleNamespace(wait=list)  # of what was written, whose places nobody asks for

        monkeypatch.setattr(shards, "FileSystemWriter", Storage)
        # The plans of ranks that are not there would have to fit to the one that is
        monkeypatch.setattr(shards._SavePlanner, "create_global_plan", lambda planner, plans: (plans, None))
        monkeypatch.setattr(state, "_as_tensor", lambda value: torch.zeros(4, dtype=torch.uint8, device="cpu"))
        dist = torch.distributed
        monkeypatch.setattr(dist, "gather_object", lambda obj, into: into.__setitem__(slice(None), [obj] * len(into)))
        monkeypatch.setattr(dist, "scatter_object_list", lambda own, plans: own.__setitem__(0, plans[0]))


def training_parts(held, optimizer, mask):
    model = torch.nn.Module()
    for name, p in held.items():
        model.register_parameter(name, p)
    from gmt_tune.integrations.torchtune.checkpoint.exchange import TrainingParts

    return TrainingParts(model, [optimizer], None, mask, None, torch.device("cuda"), None)


@pytest.mark.parametrize("copies", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("kind", ["AdamW", "compact"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_training_state_goes_to_the_host(ranks, monkeypatch, tmp_path, number, kind, copies):
    from torch.distributed.tensor import DTensor, Shard

    from gmt_tune.integrations.torchtune.checkpoint import state

    gpu, mesh = ranks(number)
    store = Store()
    store.writer(monkeypatch)
    place = (lambda t: DTensor.from_local(t, mesh, [Shard(0)], run_check=False)) if number > 1 else (lambda t: t)
    held = parameters(place=place)
    mask = GradientMask(held.items(), 0.2, refresh_every=3, dense=["p3"])
    if kind == "compact":
        optimizer = CompactAdamW(held.values(), state_bits=8)
    else:
        optimizer = torch.optim.AdamW(held.values(), foreach=True)
    mask.register(optimizer)

    def step() -> None:
        for p in held.values():
            p.grad = None
        sum((p * torch.empty_like(p)).sum() for p in held.values()).backward()
        optimizer.step()

    run(gpu, [], step, times=2)  # each has had its turn
    writer = state.plan_save(tmp_path, training_parts(held, optimizer, mask), copy=copies)
    before = gpu.reads.copy()
    writer.write()
    selected = [name for name in store if name.startswith("mask.selections.")]
    assert len(selected) == 3 and any("exp_avg" in name for name in store)
    if copies:  # while training goes on, nothing more is asked of the device
        assert {value.device.type for value in store.values()} == {"cpu"} and gpu.reads == before


def test_a_quantized_state_is_copied_to_the_host_whole(gpu):
    from gmt_tune.integrations.torchtune.checkpoint.shards import _copy
    from gmt_tune.optim.states import zeros

    for bits in (8, 4, "fp8"):
        copied = _copy(zeros((8192,), bits, signed=True, device=torch.device("cuda")))
        names, _ = copied.__tensor_flatten__()
        assert {getattr(copied, name).device.type for name in names} == {"cpu"}


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit", "compact"])
def test_an_empty_state_is_made_where_its_parameter_is(ranks, kind):
    """Also with ``fsdp_cpu_offload``, whose parameters are on the CPU of a mesh of devices."""
    import torchao.optim
    from torch.distributed.tensor import DTensor, Shard

    from gmt_tune.integrations.torchtune.checkpoint import state

    gpu, mesh = ranks(2)
    on_device = DTensor.from_local(torch.empty(64, 128, device="cuda"), mesh, [Shard(0)], run_check=False)
    on_cpu = DTensor(torch.empty(64, 128, device="cpu"), on_device._spec, requires_grad=False)
    kinds = {"AdamW": torch.optim.AdamW, "AdamW8bit": torchao.optim.AdamW8bit, "compact": CompactAdamW}
    for tensor in (on_device, on_cpu):
        p = torch.nn.Parameter(tensor)
        optimizer = kinds[kind]([p], lr=1e-3)
        if kind == "AdamW8bit" and tensor is on_cpu:
            continue  # torchao's own states are on the device, and torchtune refuses them there
        reader = SimpleNamespace(
            tensors={"exp_avg": SimpleNamespace(size=p.shape, properties=SimpleNamespace(dtype=torch.float32))}
        )
        made = state._empty_state(reader, "exp_avg", optimizer, p, "exp_avg")
        assert made.to_local().device == p.to_local().device and made.shape == p.shape


def test_what_a_mask_saves_can_be_pickled_beside_the_device(gpu):
    held = parameters()
    mask = GradientMask(held.items(), 0.2, refresh_every=3)
    optimizer = torch.optim.SGD(held.values(), lr=0.1)
    mask.register(optimizer)
    run(gpu, held.values(), optimizer.step, times=0)
    saved = mask.state_dict()
    assert pickle.loads(pickle.dumps({key: saved[key] for key in ("policy", "steps", "shards")}))["steps"]["p0"] == 1
