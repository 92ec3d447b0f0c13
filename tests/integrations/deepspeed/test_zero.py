"""DeepSpeed's ZeRO on one process and on two: flat partitions are selected as if tensors were whole."""

import json
from pathlib import Path

import launch
import pytest
import torch

pytest.importorskip("deepspeed", reason="deepspeed is not installed: requirements.txt beside this file says how")

WORKER = Path(__file__).with_name("zero_worker.py")
STAGES = (1, 2, 3)

# Where the group of norms is stepped apart from the rest. In stage 3, several parts of a group as well
ONCE = {"density": 0.2, "refresh_every": None}
SGD = {"optim": "sgd", "weight_decay": 0.0}
KEPT = {"density": 0.2, "refresh_every": 4}
BF16 = {"bf16": True}
UNCHECKED = {"enabled": True, "check_grad_overflow": False}
UNCLIPPED = {"max_grad_norm": 0.0}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def runs_of(stage: int | None) -> list[dict]:
    zero = {"sub_group_size": 6000} if stage == 3 else {}
    runs = [
        {"name": "sgd", "policy": ONCE, "changes": SGD},
        {"name": "saliency", "policy": {**ONCE, "score": "saliency"}, "changes": SGD},
        {"name": "random", "policy": {"density": 0.2, "score": "random", "refresh_every": None}, "changes": SGD},
        {"name": "dense", "policy": {**ONCE, "dense": ["*norm*"], "frozen": ["*embed_tokens*"]}, "changes": SGD},
        {"name": "loop", "policy": {"density": 0.2}, "loop": True},
    ]
    if stage is not None:
        runs += [
            {"name": "no_callback", "policy": None, "changes": BF16},
            {"name": "all", "policy": {"density": 1.0}, "changes": BF16},
            {"name": "kept", "policy": KEPT, "changes": BF16},
            # Two trainings with the output folder of one: what stops after step 3 goes on from its checkpoint
            {"name": "interrupted", "policy": KEPT, "changes": BF16, "stop_after": 3},
            {"name": "interrupted", "policy": KEPT, "changes": BF16, "resume": True},
            {"name": "tracked", "policy": {"density": 0.2, "track_selection_every": 1}},
            {"name": "global", "policy": {"density": 0.2, "scope": "global"}},
            {"name": "compact", "policy": {"density": 0.2, "compact": True}},
            {"name": "diverging", "policy": {"density": 0.2}, "changes": {**SGD, "learning_rate": 1e38}},
            {"name": "poisoned", "policy": {"density": 0.2}, "loop": True, "changes": {"bf16": UNCHECKED}},
        ]
    if stage == 1:  # DeepSpeed has an optimizer of its own for this
        accumulates = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        runs += [{"name": "bf16_optimizer", "policy": {"density": 0.2}, "loop": True, "changes": accumulates}]
    if stage in (2, 3):
        norms_dense = {**KEPT, "dense": ["*norm*"]}
        offloaded = {**zero, **OFFLOADED}
        runs += [
            {"name": "offloaded", "policy": KEPT, "changes": BF16, "zero": offloaded},
            {"name": "unclipped", "policy": norms_dense, "changes": {**BF16, **UNCLIPPED}},
            {"name": "offloaded_unclipped", "policy": norms_dense, "changes": {**BF16, **UNCLIPPED}, "zero": offloaded},
        ]
    which = "one" if stage is None else f"zero{stage}"
    return [{"zero": zero, **run, "stage": stage, "name": f"{which}_{run['name']}"} for run in runs]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Function that gives what a run left, of so many processes."""
    folders = {processes: tmp_path_factory.mktemp(f"processes{processes}") for processes in (1, 2)}
    for processes, folder in folders.items():
        runs = [run for stage in (None, *STAGES) if stage or processes == 1 for run in runs_of(stage)]
        launch.torchrun(WORKER, folder, json.dumps(runs), processes=processes, log_dir=folder)
    return lambda name, processes: torch.load(folders[processes] / f"{name}.pt")


@pytest.fixture(scope="module")
def before(results):
    return results("before", 1)


def changed(weights: dict, before: dict) -> dict:
    return {name: weights[name] != before[name] for name in weights}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("policy", ["sgd", "saliency", "random", "dense"])
def test_the_entries_that_change_are_those_that_one_process_selects(
    results, before, same_bits, policy, stage, processes
):
    """With accumulation and clipping, by SGD: what changes in five steps is the one selection."""
    one, zero = results(f"one_{policy}", 1), results(f"zero{stage}_{policy}", processes)
    entries = changed(one["weights"], before)
    assert same_bits(changed(zero["weights"], before), entries) == []
    assert zero["selected"] == one["selected"]
    for name, count in one["selected"].items():
        # A very small update can be lost in the rounding of a weight
        assert 0.9 * count <= entries[name].sum() <= count
    if policy == "dense":
        assert entries["model.norm.weight"].all() and not entries["model.embed_tokens.weight"].any()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loop_around_the_engine_equals_one_of_plain_pytorch(results, same_bits, stage, processes):
    one, zero = results("one_loop", 1), results(f"zero{stage}_loop", processes)
    assert zero["selected"] == one["selected"]
    if stage < 3:
        assert same_bits(zero["weights"], one["weights"]) == [] and zero["thresholds"] == one["thresholds"]
    else:  # whose sums of micro-batches round otherwise, with the mask or without
        for name, weights in one["weights"].items():
            torch.testing.assert_close(zero["weights"][name], weights, rtol=1e-5, atol=1e-6)
        assert same_bits(zero["weights"], results("zero3_loop", 1)["weights"]) == []


@pytest.mark.parametrize("stage", STAGES)
def test_density_1_equals_deepspeed_without_the_callback(results, same_bits, stage):
    all_, none = results(f"zero{stage}_all", 2), results(f"zero{stage}_no_callback", 2)
    assert all_["losses"] == none["losses"]
    assert same_bits(all_["weights"], none["weights"]) == []
    assert same_bits(all_["weights"], results(f"zero{stage}_kept", 2)["weights"]) != []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_undisturbed_inside_a_refresh_interval(results, same_bits, stage, processes):
    resumed, undisturbed = (results(f"zero{stage}_{name}", processes) for name in ("interrupted", "kept"))
    assert resumed["losses"] == undisturbed["losses"]
    assert same_bits(resumed["weights"], undisturbed["weights"]) == []


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(results, stage):
    """In bfloat16, by Adam; clipping norms are sums in another order."""
    one, two = results(f"zero{stage}_kept", 1), results(f"zero{stage}_kept", 2)
    assert two["selected"] == one["selected"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)


def test_bf16_with_gradients_in_fp32(results, same_bits):
    """One process's gradients and two's are equal, as all processes have the same batches."""
    one, two = results("zero1_bf16_optimizer", 1), results("zero1_bf16_optimizer", 2)
    assert one["selected"] == two["selected"] and same_bits(one["weights"], two["weights"]) == []


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_offloaded_to_the_cpu_is_masked_the_same(results, stage):
    """DeepSpeed sums the norm for clipping in another order when it offloads: one factor of all gradients differs in
    its last bits, and by it later weights, gradients and selections can. Without clipping, see below, none differs."""
    offloaded, kept = results(f"zero{stage}_offloaded", 2), results(f"zero{stage}_kept", 2)
    assert offloaded["selected"] == kept["selected"]
    assert offloaded["losses"] == pytest.approx(kept["losses"], rel=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_without_clipping_an_offloaded_optimizer_gives_the_same_bits(results, same_bits, stage, processes):
    offloaded, here = (results(f"zero{stage}_{name}", processes) for name in ("offloaded_unclipped", "unclipped"))
    assert offloaded["selected"] == here["selected"] and offloaded["losses"] == here["losses"]
    assert same_bits(offloaded["weights"], here["weights"]) == []
    assert same_bits(here["weights"], results(f"zero{stage}_kept", processes)["weights"]) != []


@pytest.mark.parametrize("stage", STAGES)
def test_selections_are_tracked(results, stage):
    one, two = (results(f"zero{stage}_tracked", processes)["tracked"] for processes in (1, 2))
    assert one == pytest.approx(two, abs=1e-4) and 0.2 < one["mask/coverage"] < 1 and 0 < one["mask/overlap"] < 1


@pytest.mark.parametrize("stage", STAGES)
def test_what_cannot_be_is_refused(results, stage):
    assert "scope 'global' needs all gradients at once, and ZeRO steps" in results(f"zero{stage}_global", 2)["refused"]
    assert "before DeepSpeed reduces them" in results(f"zero{stage}_compact", 2)["refused"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_ends_the_trainers_run(results, stage):
    """DeepSpeed leaves such steps out, without a word."""
    refused = results(f"zero{stage}_diverging", 2)["refused"]
    assert "a gradient holds NaN or infinity at optimizer step 2, which DeepSpeed left out" in refused


@pytest.mark.parametrize("stage", [1, 2])
def test_where_deepspeed_does_not_check_the_mask_does(results, stage):
    refused = results(f"zero{stage}_poisoned", 2)["refused"]
    assert "holds NaN or infinity at optimizer step 1" in refused and "model.embed_tokens.weight" in refused


def test_what_is_no_zero_optimizer_is_refused():
    from gmt_tune import GradientMask
    from gmt_tune.integrations.deepspeed import register

    layer = torch.nn.Linear(2, 2)
    mask = GradientMask(layer.named_parameters(), density=0.5)
    with pytest.raises(TypeError, match="SGD is no ZeRO optimizer: set zero_optimization.stage to 1, 2 or 3"):
        register(mask, torch.optim.SGD(layer.parameters(), lr=0.1))
