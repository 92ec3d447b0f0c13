"""The recipe on several processes: sharded by FSDP2 and by tensor parallelism, it trains as on one.

The yardstick is torchtune's own distributed recipe without a mask: from one process to two, our losses and weights
may differ by what its do, since sums over ranks round otherwise.
"""

import functools
import json
from pathlib import Path

import launch
import pytest
import torch
from omegaconf import OmegaConf
from slow_cases import slow_where

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config.check import check_config
from gmt_tune.integrations.torchtune.run.chunks import filled_length

WORKER = Path(__file__).with_name("distributed_worker.py")
MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": []}
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-3}
GRID = {
    "tensor_parallel_dim": 2,
    "tensor_parallel_plan": {"_component_": "torchtune.models.llama3.base_llama_tp_plan"},
}
# All at once what may change memory and traffic, but no number
KNOBS = dict(
    custom_sharded_layers=["tok_embeddings", "output"],
    fsdp_reshard_after_forward=False,
    ac_mode="selective",
    ac_option=2,
    enable_async_checkpointing=True,
    save_every_n_steps=2,
)
LINEAR_LOSS = {"_component_": "gmt_tune.models.losses.LinearCrossEntropyLoss", "num_chunks": 3}
CLIPPED = dict(clip_grad_norm=0.5, optimizer={"_component_": "torch.optim.SGD", "lr": 1.0})
# Layers take turns; each step is clipped, by the norm of what is selected or dense
COMPACT = dict(
    gradient_mask={**MASK, "refresh_every": 2, "dense": ["*norm*"]},
    optimizer={"_component_": "gmt_tune.CompactAdamW", "lr": 3e-3},
    clip_grad_norm=0.5,
    gradient_accumulation_steps=2,
    track_selection_every_n_steps=1,
)
LOW_BIT = ("AdamW8bit", "AdamW4bit", "AdamWFp8")
STEPS, BATCH = 3, 4


def low_bit(name: str) -> dict:
    return dict(
        gradient_mask={**MASK, "refresh_every": 4 if name == "AdamW4bit" else 1},
        optimizer={"_component_": f"torchao.optim.{name}", "lr": 1e-3},
        save_every_n_steps=2,
        enable_activation_checkpointing=name == "AdamW4bit",
    )


# name: the ranks that form its world, and what its config changes
RUNS = {
    "base on one": ([0], dict(base=True)),
    "mask on one": ([1], dict(gradient_mask=MASK)),
    "random on one": ([2], dict(gradient_mask={**MASK, "score": "random"})),
    "in backward on one": ([3], dict(gradient_mask=MASK, optimizer_in_bwd=True)),
    "base on two": ([0, 1], dict(base=True)),
    "no mask on two": ([0, 1], dict()),
    "mask on two": ([0, 1], dict(gradient_mask=MASK)),
    "knobs on two": ([0, 1], dict(gradient_mask=MASK, **KNOBS)),
    "linear loss on two": ([0, 1], dict(gradient_mask=MASK, loss=LINEAR_LOSS, **KNOBS)),
    "offload on two": ([0, 1], dict(gradient_mask=MASK, fsdp_cpu_offload=True)),
    "empty base on one": ([0], dict(base=True, empty=True)),
    "empty on two": ([0, 1], dict(empty=True, custom_sharded_layers=["output"])),
    "empty in backward on two": ([2, 3], dict(empty=True, optimizer_in_bwd=True)),
    "tied on one": ([2], dict(gradient_mask=MASK, tied=True)),
    "tied on two": ([0, 1], dict(gradient_mask=MASK, tied=True)),
    "tensor parallel on two": ([0, 1], dict(gradient_mask=MASK, **GRID)),
    "random on two": ([2, 3], dict(gradient_mask={**MASK, "score": "random"})),
    "in backward on two": ([2, 3], dict(gradient_mask=MASK, optimizer_in_bwd=True)),
    **{f"{name} on two": ([2, 3], low_bit(name)) for name in LOW_BIT},
    **{f"{name} resumed on two": ([2, 3], low_bit(name)) for name in LOW_BIT},
    **{f"{name} resumed on one": ([i], low_bit(name)) for i, name in enumerate(LOW_BIT)},
    "compact on one": ([0], COMPACT),
    "compact on two": ([0, 1], COMPACT),
    "compact tensor parallel on two": ([2, 3], dict(COMPACT, **GRID)),
    "compact on 2x2": ([0, 1, 2, 3], dict(COMPACT, **GRID)),
    "base on 2x2": ([0, 1, 2, 3], dict(base=True, **GRID)),
    "mask on 2x2": ([0, 1, 2, 3], dict(gradient_mask=MASK, save_every_n_steps=2, **GRID)),
    "mask resumed on 1x2": ([0, 1], dict(gradient_mask=MASK, origin="mask on 2x2", **GRID)),
    "clipped on one": ([2], dict(gradient_mask=MASK, **CLIPPED)),
    "clipped on 2x2": ([0, 1, 2, 3], dict(gradient_mask=MASK, **CLIPPED, **GRID)),
    "AdamW8bit on 2x2": ([0, 1, 2, 3], dict(low_bit("AdamW8bit"), **GRID)),
    "AdamW8bit resumed on 2x2": ([0, 1, 2, 3], dict(low_bit("AdamW8bit"), **GRID)),
}
# The last of them show what others do, in another combination
SLOW = [name for name in RUNS if name.startswith(("AdamW4bit", "AdamWFp8", "linear loss", "offload"))]
SLOW += ["tensor parallel on two", "compact tensor parallel on two", "AdamW8bit on 2x2", "AdamW8bit resumed on 2x2"]
each = functools.partial(slow_where, SLOW.__contains__)  # of names of runs


@pytest.fixture(scope="module")
def tiny_llama3(tmp_path_factory, tiny_world):
    """A folder with a Llama whose output layer is its own, as base_llama_tp_plan wants it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama3")
    theirs = json.loads((tiny_world / "model" / "config.json").read_text())
    torch.manual_seed(1)
    shape = dict(intermediate_size=92, tie_word_embeddings=False)
    LlamaForCausalLM(LlamaConfig(**{**theirs, **shape})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_world, tiny_llama3, tiny_config):
    """Function that gives a run's output folder; all are trained under one torchrun, the slow ones under another."""
    root = tmp_path_factory.mktemp("runs")
    rows = [json.loads(line) for line in (tiny_world / "train.jsonl").read_text().splitlines()[: STEPS * BATCH]]
    for i in (5, 7, 8, 10):  # of two ranks, one has nothing to learn in the second step and the other in the third
        rows[i]["question"] = "word " * 300  # which fills max_seq_len
    (root / "empty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs: dict[bool, list[dict]] = {False: [], True: []}
    for name, (ranks, changes) in RUNS.items():
        changes = {"optimizer": ADAMW, "lr_scheduler": None, "max_steps_per_epoch": STEPS, **changes}
        job = {"ranks": ranks}
        tied, empty = changes.pop("tied", False), changes.pop("empty", False)
        if changes.pop("base", False):
            job["base"] = True
        if "resumed" in name:
            origin = changes.pop("origin", name.replace(" resumed", ""))
            job["resume"] = str(root / (origin if origin in RUNS else f"{name.split()[0]} on two") / "step_2")
            changes["resume_from_checkpoint"] = True
        data_parallel = len(ranks) // changes.get("tensor_parallel_dim", 1)
        if name.endswith("resumed on one"):
            data_parallel = 2  # as it was: on fewer processes, a step has fewer rows
        config = tiny_config(root / name, batch_size=BATCH // data_parallel, **changes)
        if empty:
            config["shuffle"] = False
            config["dataset"]["data_files"] = str(root / "empty.jsonl")
        if not tied:
            config["model"].update(_component_="torchtune.models.llama3.llama3", intermediate_dim=92)
            config["model"].pop("scale_factor")
            config["checkpointer"].update(checkpoint_dir=str(tiny_llama3), model_type="LLAMA3")
        jobs[name in SLOW].append({**job, "config": config})

    @functools.cache
    def train(is_slow: bool) -> None:
        file = root / f"jobs_{is_slow}.json"
        file.write_text(json.dumps(jobs[is_slow]))
        launch.torchrun(WORKER, file, processes=4, log_dir=root)

    def trained(name: str) -> Path:
        train(name in SLOW)
        return root / name

    return trained


@pytest.fixture(scope="module")
def losses(runs, logged_metrics):
    """Function that gives the losses of a run, step by step."""
    return lambda name: [step["loss"] for step in logged_metrics(runs(name))]


@pytest.fixture(scope="module")
def weights(runs, final_weights):
    """Function that gives the weights that a run saved."""
    return lambda name: final_weights(runs(name))


def assert_equal(found: dict, wanted: dict):
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key


def test_without_a_mask_two_processes_equal_torchtunes_two_bit_for_bit(losses, weights):
    wanted = losses("base on two")
    assert len(wanted) == STEPS == len(set(wanted))
    assert losses("no mask on two") == wanted
    assert_equal(weights("no mask on two"), weights("base on two"))


@pytest.mark.parametrize("name", ["empty on two", "empty in backward on two"])
def test_a_rank_without_a_token_in_the_loss_adds_nothing_to_the_step(name, losses, weights):
    """The yardstick is torchtune's recipe on one process, with the rows of all ranks in one batch."""
    assert losses(name) == pytest.approx(losses("empty base on one"), rel=1e-5)
    found, wanted = weights(name), weights("empty base on one")
    assert found.keys() == wanted.keys() and len(wanted) > 5
    for key, weight in wanted.items():
        # Adam moves an entry whose gradient is all but zero by its rate one way or the other: few may
        assert ((found[key] - weight).abs() > 1e-5).float().mean() < 0.01, key


PAIRS = [
    ("mask on one", "mask on two", "base on two"),
    ("random on one", "random on two", "base on two"),
    ("in backward on one", "in backward on two", "base on two"),
    ("mask on two", "knobs on two", "base on two"),
    ("mask on two", "linear loss on two", "base on two"),
    ("mask on two", "offload on two", "base on two"),
    ("tied on one", "tied on two", "base on two"),
    ("mask on one", "mask on 2x2", "base on 2x2"),
    ("mask on one", "tensor parallel on two", "base on 2x2"),
    ("compact on one", "compact on two", "base on two"),
    ("compact on one", "compact on 2x2", "base on 2x2"),
    ("compact on one", "compact tensor parallel on two", "base on 2x2"),
]


@pytest.mark.parametrize(
    ("one", "several", "base"), [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[1] in SLOW)) for pair in PAIRS]
)
def test_from_one_to_several_losses_and_weights_differ_as_little_as_torchtunes(one, several, base, losses, weights):
    def differences(a, b):
        by_loss = max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))
        by_weight = max((weights(a)[key] - wanted).abs().max().item() for key, wanted in weights(b).items())
        return by_loss, by_weight

    ours, theirs = differences(one, several), differences("base on one", base)
    assert 0 < max(theirs) < 1e-5  # sums over ranks round otherwise
    assert ours[0] <= 2 * theirs[0] and ours[1] <= 2 * theirs[1], (ours, theirs)


def test_the_runs_that_are_compared_train_and_differ_by_their_masks(losses, weights):
    """What shows that the comparison above can fail."""
    for name in RUNS.keys() - SLOW:
        found = losses(name)
        assert len(found) == (STEPS - 2 if "resumed" in name else STEPS)
        assert "resumed" in name or found[-1] < found[0] - 0.05, name
    for a, b in (("base on two", "mask on two"), ("mask on two", "random on two")):
        assert max((weights(a)[key] - w).abs().max().item() for key, w in weights(b).items()) > 1e-3


@pytest.mark.parametrize("score", ["mask", "random"])
def test_as_many_entries_are_selected_on_any_number_of_processes(score, runs, logged_metrics):
    found = [[step["mask/density"] for step in logged_metrics(runs(f"{score} on {n}"))] for n in ("one", "two")]
    assert len(found[0]) == STEPS and found[0] == found[1]


@pytest.mark.parametrize("name", each(["compact on two", "compact on 2x2", "compact tensor parallel on two"]))
def test_selected_entries_are_as_many_as_old_and_of_the_same_norm_on_any_number_of_processes(
    name, runs, logged_metrics
):
    keys = ("mask/density", "mask/coverage", "mask/overlap", "mask/age", "grad_norm")
    found, wanted = (
        [[step.get(key, 0.0) for key in keys] for step in logged_metrics(runs(each))]
        for each in (name, "compact on one")
    )
    assert len(wanted) == STEPS and min(norm for *_, norm in wanted) > 0.5 and wanted[-1][3] > 1.2
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    "name", each([f"{optimizer} resumed on two" for optimizer in LOW_BIT] + ["AdamW8bit resumed on 2x2"])
)
def test_sharded_low_bit_states_are_saved_and_go_on_exactly(name, runs, losses, weights):
    straight = name.replace(" resumed", "")
    kind = f"OptimState{name.split()[0].removeprefix('AdamW')}".lower()
    assert kind in (runs(straight) / "step_2" / "training_state" / "__0_0.distcp").read_bytes().decode("latin1").lower()
    assert losses(name) == losses(straight)[2:]
    assert_equal(weights(name), weights(straight))


@pytest.mark.parametrize("name", each([f"{optimizer} resumed on one" for optimizer in LOW_BIT]))
def test_sharded_low_bit_states_go_on_in_one_process(name, losses):
    assert losses(name)[0] < losses(name.replace("resumed on one", "on two"))[0] - 0.1


def test_from_a_grid_a_run_goes_on_with_tensor_parallelism_alone(losses, weights):
    assert losses("mask resumed on 1x2") == pytest.approx(losses("mask on 2x2")[2:], abs=1e-5)
    found, wanted = weights("mask resumed on 1x2"), weights("mask on 2x2")
    assert len(wanted) > 10 and all((found[key] - weight).abs().max() < 1e-4 for key, weight in wanted.items())


def test_on_a_grid_gradients_are_clipped_by_the_norm_of_all(runs, losses, weights, logged_metrics):
    norms = [[step["grad_norm"] for step in logged_metrics(runs(f"clipped on {n}"))] for n in ("one", "2x2")]
    assert min(norms[0]) > 0.6  # so that each step is clipped
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert losses("clipped on 2x2") == pytest.approx(losses("clipped on one"), abs=1e-5)
    found, wanted = weights("clipped on 2x2"), weights("clipped on one")
    # The last bit of a gradient can decide which of two entries is selected
    assert all(((found[key] - weight).abs() > 1e-5).float().mean() < 1e-3 for key, weight in wanted.items())


def test_an_optimizer_that_takes_gradients_away_is_refused(tmp_path, tiny_config):
    config = tiny_config(tmp_path, gradient_mask=MASK, optimizer={"_component_": "torchao.optim.CPUOffloadOptimizer"})
    with pytest.raises(UserError, match="moves gradients to the host before they can be masked: to save memory, use"):
        check_config(OmegaConf.create(config))


def test_embeddings_that_the_output_layer_uses_are_not_sharded_by_themselves(tmp_path, tiny_config):
    config = tiny_config(tmp_path, custom_sharded_layers=["tok_embeddings"])
    with pytest.raises(UserError, match="custom_sharded_layers must not name tok_embeddings for this model"):
        check_config(OmegaConf.create(config))


def test_filled_chunks_are_as_many_as_asked_for():
    for chunks in (1, 2, 8, 9):
        for length in range(1, 120):
            filled = filled_length(length, chunks)
            assert len(torch.empty(filled).chunk(chunks)) == chunks
            if len(torch.empty(length).chunk(chunks)) == chunks:
                assert filled == length


def test_tune_run_on_two_processes_leaves_a_model_for_transformers(run_tune, tmp_path, logged_metrics):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "out"
    overrides = [f"output_dir={output}", "metric_logger.filename=log.txt", "epochs=1", "max_steps_per_epoch=4"]
    overrides += ["evaluation.size=8", "lr_scheduler.num_warmup_steps=1"]
    command = ["run", "--nproc_per_node", 2, "gmt_full_finetune", "--config", "quickstart", *overrides]
    run_tune(*command, cwd=tmp_path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    steps = [step for step in logged_metrics(output) if "loss" in step]
    assert len(steps) == 4 and steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert all(0.19 < step["mask/density"] < 0.25 for step in steps)

    model = AutoModelForCausalLM.from_pretrained(output / "epoch_0")
    ids = AutoTokenizer.from_pretrained(output / "epoch_0")("Who", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
