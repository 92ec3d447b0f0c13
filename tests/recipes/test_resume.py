"""A run that was interrupted and resumed ends with the same losses and weights as one that was not."""

import json
import shutil
from pathlib import Path

import launch
import pytest
import torch
import yaml
from forked_run import ForkedRun
from safetensors.torch import load_file
from slow_cases import slow_where
from transformers import LlamaConfig, LlamaForCausalLM

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint import folder as checkpoint_folder
from gmt_tune.integrations.torchtune.checkpoint import manifest
from gmt_tune.integrations.torchtune.checkpoint import state as training_state

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": []}
ADAMW_8BIT = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}
COMPACT = {"_component_": "gmt_tune.CompactAdamW", "lr": 1e-3}

VARIANTS = {
    "refresh 1, adamw": dict(gradient_mask=MASK),
    "written in the background": dict(gradient_mask=MASK, enable_async_checkpointing=True),
    "inside a refresh interval, accumulation, clipping": dict(
        gradient_mask={**MASK, "refresh_every": 5}, gradient_accumulation_steps=2, batch_size=2, clip_grad_norm=0.5
    ),
    "one-off selection, 8-bit": dict(
        gradient_mask={**MASK, "refresh_every": None}, optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}
    ),
    "random selection, optimizer in backward": dict(gradient_mask={**MASK, "score": "random"}, optimizer_in_bwd=True),
    "8-bit, optimizer in backward with a schedule": dict(
        gradient_mask=MASK, optimizer_in_bwd=True, optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}
    ),
    "bf16, stochastic rounding": dict(
        gradient_mask=MASK,
        dtype="bf16",
        optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3, "bf16_stochastic_round": True},
    ),
    "micro-batches left over at the end of an epoch": dict(
        gradient_mask=MASK, gradient_accumulation_steps=3, max_steps_per_epoch=None
    ),
    "packed, saliency, with validation": dict(
        gradient_mask={**MASK, "score": "saliency"}, packed=True, run_val_every_n_steps=2
    ),
    "compact, 8-bit, inside a refresh interval, clipping, bf16, micro-batches left over": dict(
        gradient_mask={**MASK, "density": 0.6, "refresh_every": 3, "dense": ["*norm*"]},
        optimizer={**COMPACT, "state_bits": 8, "bf16_stochastic_round": True},
        gradient_accumulation_steps=3,
        max_steps_per_epoch=None,
        clip_grad_norm=1.0,
        dtype="bf16",
        track_selection_every_n_steps=1,
    ),
}

# What these have, one of the others has as well, beside something else
SLOW = (
    "refresh 1, adamw",
    "bf16, stochastic rounding",
    "micro-batches left over at the end of an epoch",
    "8-bit, packed",
    "on one, one-off selection",
)


# The others are resumed within the first epoch alone: what is saved at its end is the same
AT_AN_EPOCHS_END_TOO = [
    name for name in VARIANTS if name == "refresh 1, adamw" or "left over" in name or "packed" in name
]


def interrupted_at(output_dir, step):
    """Take away every checkpoint behind a step, as if the run had been killed right after saving it."""
    for folder in list(output_dir.glob("step_*")) + list(output_dir.glob("epoch_*")):
        progress = json.loads((folder / "training_progress.json").read_text())["progress"]
        if progress["global_step"] > step:
            shutil.rmtree(folder)


def with_data(config: dict, packed: bool) -> dict:
    """Packed rows, and the same data held out, where a variant asks for them."""
    config["dataset"]["packed"] = packed
    if "run_val_every_n_steps" in config:
        config["dataset_val"] = dict(config["dataset"])
    return config


@pytest.mark.parametrize("variant", slow_where(SLOW.__contains__, VARIANTS))
def test_resumed_run_equals_uninterrupted_one(
    variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights, eager
):
    resume_and_compare(variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "8-bit" in name or "bf16" in name])
def test_resumed_run_equals_uninterrupted_one_with_compiled_optimizers(
    variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights
):
    resume_and_compare(variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights)


def resume_and_compare(variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights):
    changes = dict(epochs=2, max_steps_per_epoch=5, save_every_n_steps=1, seed=3)
    changes.update(VARIANTS[variant])
    packed = changes.pop("packed", False)
    run_recipe(with_data(tiny_config(tmp_path / "straight", **changes), packed))
    losses = losses_of(tmp_path / "straight", logged_metrics)
    numbers = numbers_of(tmp_path / "straight", logged_metrics)
    wanted = final_weights(tmp_path / "straight", 1)

    half = len(losses) // 2  # the end of the first epoch
    for step in (min(2, half - 1), half) if variant in AT_AN_EPOCHS_END_TOO else (min(2, half - 1),):
        resumed = tmp_path / f"resumed_at_{step}"
        shutil.copytree(tmp_path / "straight", resumed)
        (resumed / "logs" / "log.txt").unlink()
        interrupted_at(resumed, step)
        recipe = run_recipe(with_data(tiny_config(resumed, resume_from_checkpoint=True, **changes), packed))
        assert losses_of(resumed, logged_metrics) == losses[step:], f"losses after step {step}"
        assert numbers_of(resumed, logged_metrics) == numbers[step:], f"numbers after step {step}"
        weights = final_weights(resumed, 1)
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted), f"weights, resumed at {step}"
        assert recipe._mask.step == len(losses)


def numbers_of(output_dir, logged_metrics):
    keys = "grad_norm", "mask/density", "mask/coverage", "mask/overlap", "mask/age"
    return [{key: step.get(key) for key in keys} for step in logged_metrics(output_dir) if "loss" in step]


def losses_of(output_dir, logged_metrics):
    return [step["loss"] for step in logged_metrics(output_dir) if "loss" in step]


@pytest.mark.parametrize("at_first", [False, True])
def test_activation_checkpointing_may_be_switched_when_a_run_goes_on(
    at_first, tmp_path, tiny_config, run_recipe, final_weights
):
    """Such as after it ran out of memory. It wraps layers, which changes the names of their parameters."""
    changes = dict(gradient_mask={**MASK, "refresh_every": 3}, save_every_n_steps=1, max_steps_per_epoch=4)
    run_recipe(tiny_config(tmp_path, enable_activation_checkpointing=at_first, **changes))
    wanted = final_weights(tmp_path)
    interrupted_at(tmp_path, 2)
    switched = dict(changes, enable_activation_checkpointing=not at_first, resume_from_checkpoint=True)
    run_recipe(tiny_config(tmp_path, **switched))
    weights = final_weights(tmp_path)
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_optimizer_states_go_where_their_parameter_is():
    """Also with fsdp_cpu_offload, whose parameters are on the CPU; and in a run that goes on elsewhere."""
    p = torch.empty(2, 3, device="meta")  # stands for another device
    assert training_state._empty(p, p.shape, torch.float32).device == p.device
    for was_on_accelerator, is_fused, wanted in ((False, False, "cpu"), (False, True, "meta"), (True, False, "meta")):
        count = training_state._count(torch.tensor(3.0), was_on_accelerator, {"fused": is_fused}, p)
        assert count.device.type == wanted


# name: (processes that go on, what the config changes); all are begun by two
ON_TWO = {
    "adamw, accumulation, inside a refresh interval": (
        2,
        dict(gradient_mask={**MASK, "refresh_every": 5}, gradient_accumulation_steps=2, batch_size=2),
    ),
    "8-bit, packed": (2, dict(gradient_mask=MASK, packed=True, batch_size=1, optimizer=ADAMW_8BIT)),
    "compact, 8-bit, accumulation, inside a refresh interval, written in the background": (
        2,
        dict(
            gradient_mask={**MASK, "density": 0.6, "refresh_every": 3, "dense": ["*norm*"]},
            optimizer={**COMPACT, "state_bits": 8},
            gradient_accumulation_steps=2,
            batch_size=1,
            enable_async_checkpointing=True,
        ),
    ),
    "on one, compact in turns": (
        1,
        dict(gradient_mask={**MASK, "refresh_every": 3}, optimizer=COMPACT),
    ),
    "on one, one-off selection": (
        1,
        dict(
            gradient_mask={**MASK, "refresh_every": None},
            optimizer={"_component_": "torch.optim.SGD", "lr": 0.5},
            enable_activation_checkpointing=True,
        ),
    ),
}


@pytest.mark.parametrize("variant", slow_where(SLOW.__contains__, ON_TWO))
def test_a_run_of_two_processes_goes_on(variant, tmp_path, tiny_world, tiny_config, logged_metrics, final_weights):
    processes, changes = ON_TWO[variant]
    changes = dict(epochs=2, max_steps_per_epoch=5, save_every_n_steps=3, batch_size=2, lr_scheduler=None) | changes
    packed = changes.pop("packed", False)

    def run(name: str, processes: int, **more):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = with_data(tiny_config(folder / "out", **{**changes, **more}), packed)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        assert ForkedRun(folder / "config.yaml", processes=processes).wait(240) == [0] * processes
        return losses_of(folder / "out", logged_metrics), final_weights(folder / "out", 1)

    losses, wanted = run("straight", 2)
    shutil.copytree(tmp_path / "straight" / "out", tmp_path / "resumed" / "out")
    (tmp_path / "resumed" / "out" / "logs" / "log.txt").unlink()
    interrupted_at(tmp_path / "resumed" / "out", 3)
    accumulation = changes.get("gradient_accumulation_steps", 1) * 2 // processes  # the same rows in a step
    resumed, weights = run("resumed", processes, resume_from_checkpoint=True, gradient_accumulation_steps=accumulation)
    if processes == 2:
        assert resumed == losses[3:]
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
        return
    # On one process sums round otherwise, but the entries that move are those that two processes selected
    assert resumed == pytest.approx(losses[3:], rel=1e-4)
    before = load_all(tiny_world / "model")
    most = 0.3 if changes["gradient_mask"]["refresh_every"] is None else 0.8  # of four selections or fewer
    for key in wanted:
        assert torch.equal(weights[key] != before[key], wanted[key] != before[key]), key
        assert 0.1 < (wanted[key] != before[key]).double().mean() < most, key


OTHER_RANKS = {
    "AdamW": "torch.optim",
    "AdamW8bit": "torchao.optim",
    "AdamW4bit": "torchao.optim",
    "CompactAdamW": "gmt_tune",
}


@pytest.fixture(scope="module", params=slow_where("CompactAdamW".__ne__, OTHER_RANKS))
def runs_on_two_and_four(request, tmp_path_factory, tiny_world, tiny_config):
    """The folder of an optimizer's runs: "on 2", "on 4" (ranks), and from step 3 on "on 4 to 2" and "on 2 to 4"."""
    optimizer, root = request.param, tmp_path_factory.mktemp("two_and_four")
    # Matrices that four ranks still hold in whole quantized blocks: smaller ones keep states of 32 bits there
    shape = dict(hidden_size=128, intermediate_size=256, num_key_value_heads=4, head_dim=32)
    theirs = json.loads((tiny_world / "model" / "config.json").read_text())
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**{**theirs, **shape})).save_pretrained(root / "model")
    jobs = []
    for before, ranks in ((None, 4), (None, 2), (4, 2), (2, 4)):
        config = tiny_config(
            root / (f"on {before} to {ranks}" if before else f"on {ranks}"),
            gradient_mask={**MASK, "refresh_every": 4},
            optimizer={"_component_": f"{OTHER_RANKS[optimizer]}.{optimizer}", "lr": 1e-3},
            track_selection_every_n_steps=1,
            lr_scheduler=None,
            max_steps_per_epoch=6,
            save_every_n_steps=3,
            batch_size=8 // ranks,
            resume_from_checkpoint=before is not None,
        )
        config["model"].update(embed_dim=128, intermediate_dim=256, num_kv_heads=4)
        config["checkpointer"]["checkpoint_dir"] = str(root / "model")
        job = {"ranks": list(range(ranks)), "config": config}
        if before:
            job["resume"] = str(root / f"on {before}" / "step_3")
        jobs.append(job)
    (root / "jobs.json").write_text(json.dumps(jobs))
    launch.torchrun(Path(__file__).with_name("distributed_worker.py"), root / "jobs.json", processes=4, log_dir=root)
    return root


@pytest.mark.parametrize(("before", "ranks"), [(4, 2), (2, 4)])
def test_on_another_number_of_ranks_a_run_goes_on_as_one_that_they_began(
    before, ranks, runs_on_two_and_four, logged_metrics
):
    """But for the rounding of sums over ranks, which the runs that were not interrupted show as well."""

    def numbers(name: str, key: str) -> list[float]:
        steps = logged_metrics(runs_on_two_and_four / f"on {name}")
        return [step[key] for step in steps if key in step]  # a first step overlaps with none

    resumed, wanted, other = (numbers(str(name), "loss") for name in (f"{before} to {ranks}", ranks, before))
    assert len(resumed) == 3 and len(wanted) == 6 and wanted[5] < wanted[2] < wanted[0]
    noise = max(abs(a - b) for a, b in zip(wanted, other, strict=True))
    assert 0 < noise < 1e-4
    assert resumed == pytest.approx(wanted[3:], abs=2 * noise)
    for key in ("mask/density", "mask/coverage", "mask/overlap"):  # selections and what was ever selected
        found = numbers(f"{before} to {ranks}", key)
        assert len(found) == 3 and found == pytest.approx(numbers(str(ranks), key)[-3:], abs=1e-4), key


def load_all(folder):
    """The weights of a Hugging Face folder by name."""
    weights = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    assert weights, f"no weights in {folder}"
    return weights


def test_on_more_processes_than_rows_are_left_for_a_run_still_ends_with_its_model(tmp_path, tiny_config, final_weights):
    """Behind the twentieth step of three rows, four of 64 are left: too few for a step of two processes."""
    file = tmp_path / "config.yaml"
    changes = dict(gradient_mask=MASK, max_steps_per_epoch=None, save_every_n_steps=20, batch_size=3)
    file.write_text(yaml.safe_dump(tiny_config(tmp_path / "out", **changes)))
    assert ForkedRun(file).wait(120) == [0]
    interrupted_at(tmp_path / "out", 20)
    wanted = load_all(tmp_path / "out" / "step_20")
    assert ForkedRun(file, "resume_from_checkpoint=True", processes=2).wait(120) == [0, 0]
    progress = json.loads((tmp_path / "out" / "epoch_0" / "training_progress.json").read_text())["progress"]
    assert progress["is_final"] and progress["global_step"] == 20
    weights = final_weights(tmp_path / "out")
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_resuming_with_nothing_saved_yet_starts_from_the_beginning(tmp_path, tiny_config, run_recipe, logged_metrics):
    run_recipe(tiny_config(tmp_path / "plain"))
    run_recipe(tiny_config(tmp_path / "resumed", resume_from_checkpoint=True))
    losses = [[s["loss"] for s in logged_metrics(tmp_path / name)] for name in ("plain", "resumed")]
    assert losses[0] == losses[1]


def test_a_complete_run_is_not_trained_again(tmp_path, tiny_config, run_recipe, final_weights):
    run_recipe(tiny_config(tmp_path, gradient_mask=MASK))
    before = (tmp_path / "epoch_0" / "training_progress.json").stat().st_mtime_ns
    recipe = run_recipe(tiny_config(tmp_path, gradient_mask=MASK, resume_from_checkpoint=True))
    assert recipe.global_step == 4
    assert (tmp_path / "epoch_0" / "training_progress.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="complete and kept no optimizer state"):
        run_recipe(tiny_config(tmp_path, gradient_mask=MASK, resume_from_checkpoint=True, epochs=3))


def test_a_final_checkpoint_is_an_ordinary_hugging_face_folder(tmp_path, tiny_config, run_recipe):
    from transformers import AutoModelForCausalLM

    run_recipe(tiny_config(tmp_path, save_every_n_steps=2))
    names = {path.name for path in (tmp_path / "epoch_0").iterdir()}
    assert not any(name.startswith("training_state") for name in names)
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"} <= names
    index = json.loads((tmp_path / "epoch_0" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) <= names
    for name in ("epoch_0", "step_2"):
        _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]


@pytest.mark.parametrize(
    "damage", ["truncated", "changed", "state changed", "missing", "no manifest", "manifest changed"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage, tmp_path, tiny_config, run_recipe, final_weights, caplog
):
    changes = dict(gradient_mask=MASK, save_every_n_steps=1, max_steps_per_epoch=4)
    run_recipe(tiny_config(tmp_path / "straight", **changes))
    wanted = final_weights(tmp_path / "straight")
    run = tmp_path / "damaged"
    shutil.copytree(tmp_path / "straight", run)
    interrupted_at(run, 3)
    weights = next((run / "step_3").glob("*.safetensors"))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "changed":
        data = bytearray(weights.read_bytes())
        data[-1000] ^= 0xFF
        weights.write_bytes(data)
    elif damage == "state changed":
        state = run / "step_3" / "training_state" / "__0_0.distcp"
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 0x01
        state.write_bytes(data)
    elif damage == "manifest changed":
        manifest = run / "step_3" / "training_progress.json"
        manifest.write_text(manifest.read_text().replace('"samples": 12', '"samples": 16'))
    elif damage == "missing":
        (run / "step_3" / "training_state" / "__0_0.distcp").unlink()
    else:
        (run / "step_3" / "training_progress.json").write_text("{")
    caplog.set_level("INFO")
    # Were the damaged one to count as the newest, the one saved after it would be deleted
    run_recipe(tiny_config(run, resume_from_checkpoint=True, keep_last_n_checkpoints=2, **changes))
    assert (run / ("earlier_step_3" if "manifest" in damage else "damaged_step_3")).is_dir()
    named = f"{run / 'step_3'} is passed over" if "manifest" in damage else f"{run / 'step_3'} is damaged"
    assert named in caplog.text
    assert f"Going on from {run / 'step_2'}" in caplog.text
    weights = final_weights(run)
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_damaged_checkpoints_do_not_count_among_the_newest(tmp_path, tiny_config, run_recipe):
    run_recipe(tiny_config(tmp_path, save_every_n_steps=1, max_steps_per_epoch=4))
    interrupted_at(tmp_path, 3)
    for step in (2, 3):
        next((tmp_path / f"step_{step}").glob("*.safetensors")).write_bytes(b"")
    found = checkpoint_folder.newest_whole(tmp_path, print)
    assert found.path.name == "step_1"
    checkpoint_folder.set_damaged_aside(tmp_path, newer_than=found)
    checkpoint_folder.keep_newest(tmp_path, 1)
    assert {p.name for p in tmp_path.glob("*step_*")} == {"step_1", "damaged_step_2", "damaged_step_3"}


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path, tiny_config, run_recipe, monkeypatch, caplog
):
    def discard(folder):
        raise OSError(39, "Directory not empty", str(folder))  # as on NFS while somebody reads a file in it

    monkeypatch.setattr(checkpoint_folder, "discard", discard)
    run_recipe(tiny_config(tmp_path, save_every_n_steps=1, max_steps_per_epoch=3, keep_last_n_checkpoints=1))
    assert {p.name for p in tmp_path.glob("step_*")} == {"step_1", "step_2"} and (tmp_path / "epoch_0").is_dir()
    assert "older checkpoints could not be put in order" in caplog.text and "Directory not empty" in caplog.text


def test_only_the_newest_checkpoints_and_the_best_are_kept(tmp_path, tiny_config, run_recipe):
    config = tiny_config(tmp_path, save_every_n_steps=1, max_steps_per_epoch=8, keep_last_n_checkpoints=2)
    config["dataset_val"] = dict(config["dataset"])
    run_recipe({**config, "run_val_every_n_steps": 1, "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.0}})
    kept = sorted(path.name for path in tmp_path.iterdir() if (path / "training_progress.json").exists())
    best = json.loads((tmp_path / "best_checkpoint.json").read_text())
    assert best["folder"] == "step_1"  # with a learning rate of zero, none is better than the first
    assert kept == ["epoch_0", "step_1", "step_7"]


@pytest.fixture(scope="module")
def a_run_of_four_steps(tmp_path_factory, tiny_config, run_recipe):
    output_dir = tmp_path_factory.mktemp("four_steps")
    changes = dict(gradient_mask=MASK, save_every_n_steps=2)
    run_recipe(tiny_config(output_dir, **changes))
    return output_dir, changes


@pytest.mark.parametrize(
    "change, said",
    [
        ({"gradient_mask": {**MASK, "density": 0.5}}, r"gradient_mask\.density is 0\.5, was 0\.2"),
        (
            {"optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-3}},
            r"optimizer\._component_ is 'torch\.optim\.SGD'",
        ),
        ({"optimizer": COMPACT}, r"optimizer\._component_ is 'gmt_tune\.CompactAdamW', was 'torch\.optim\.AdamW'"),
        ({"batch_size": 2}, r"batch_size is 2, was 4"),
        ({"batch_size": 2, "gradient_accumulation_steps": 2}, r"batch_size is 2, was 4"),
        ({"dataset.column_map": {"input": "answer", "output": "question"}}, r"column_map\.input is 'answer'"),
        ({"shuffle": False}, r"shuffle is False, was True"),
        (
            {"tensor_parallel_plan": {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}},
            r"tensor_parallel_plan is .*base_llama_tp_plan'}, was None",
        ),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_checkpoint_says_what_differs(
    change, said, tiny_config, run_recipe, a_run_of_four_steps
):
    output_dir, changes = a_run_of_four_steps
    config = tiny_config(output_dir, resume_from_checkpoint=True, **changes)
    for key, value in change.items():
        section, _, last = key.rpartition(".")
        (config[section] if section else config)[last] = value
    with pytest.raises(UserError, match=said):
        run_recipe(config)


def test_a_checkpoint_of_the_previous_format_says_what_to_do(tmp_path, tiny_config, run_recipe, a_run_of_four_steps):
    output_dir, changes = a_run_of_four_steps
    shutil.copytree(output_dir, tmp_path / "out")
    for folder in ("step_2", "epoch_0"):
        file = tmp_path / "out" / folder / manifest.MANIFEST
        content = json.loads(file.read_text())
        del content["checksum"], content["format"]
        file.write_text(json.dumps({**content, "checksum": manifest._checksum(content)}))
    with pytest.raises(
        UserError, match="epoch_0 was saved by an earlier version of gmt-tune.*checkpoint_dir=.*epoch_0"
    ):
        run_recipe(tiny_config(tmp_path / "out", resume_from_checkpoint=True, **changes))
    assert (tmp_path / "out" / "step_2").is_dir() and not any((tmp_path / "out").glob("damaged_*"))


def test_data_that_has_changed_meanwhile_is_named(tmp_path, tiny_world, tiny_config, run_recipe):
    rows = (tiny_world / "train.jsonl").read_text().splitlines()
    file = tmp_path / "rows.jsonl"
    for count in (64, 60):
        file.write_text("\n".join(rows[:count]) + "\n")
        config = tiny_config(tmp_path / "out", max_steps_per_epoch=2, save_every_n_steps=1, resume_from_checkpoint=True)
        config["dataset"]["data_files"] = str(file)
        if count == 64:
            run_recipe(config)
        else:
            with pytest.raises(UserError, match="dataset has 60 rows, had 64"):
                run_recipe(config)


def test_a_new_run_moves_the_checkpoints_of_an_earlier_one_aside(tmp_path, tiny_config, run_recipe):
    run_recipe(tiny_config(tmp_path, save_every_n_steps=2, max_steps_per_epoch=4))
    run_recipe(tiny_config(tmp_path, max_steps_per_epoch=2))
    assert {p.name for p in (tmp_path / "previous_1").iterdir()} >= {"epoch_0", "step_2"}
    assert not (tmp_path / "step_2").exists() and (tmp_path / "epoch_0").exists()


def test_where_no_checkpoint_is_whole_a_run_begins_again_and_keeps_what_it_saves(
    tmp_path, tiny_config, run_recipe, final_weights, caplog
):
    changes = dict(gradient_mask=MASK, save_every_n_steps=1, keep_last_n_checkpoints=1)
    run_recipe(tiny_config(tmp_path / "straight", **changes))
    later = dict(save_every_n_steps=8, max_steps_per_epoch=9, keep_last_n_checkpoints=None)
    run_recipe(tiny_config(tmp_path / "out", **{**changes, **later}))
    shutil.rmtree(tmp_path / "out" / "epoch_0")
    weights = next((tmp_path / "out" / "step_8").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    caplog.set_level("INFO")
    run_recipe(tiny_config(tmp_path / "out", resume_from_checkpoint=True, **changes))
    assert f"None of the checkpoints in {tmp_path / 'out'} is whole: starting from the beginning" in caplog.text
    assert {p.name for p in (tmp_path / "out").glob("*_[0-9]")} == {"epoch_0", "damaged_step_8"}
    resumed, wanted = final_weights(tmp_path / "out"), final_weights(tmp_path / "straight")
    assert len(wanted) > 10
    assert all(torch.equal(resumed[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("resumes", [False, True])
def test_a_folder_of_the_users_with_a_checkpoints_name_is_kept(resumes, tmp_path, tiny_config, run_recipe):
    """torchtune's own recipes write output_dir/epoch_0."""
    (tmp_path / "epoch_0").mkdir()
    (tmp_path / "epoch_0" / "precious.safetensors").write_text("mine")
    run_recipe(tiny_config(tmp_path, resume_from_checkpoint=resumes, max_steps_per_epoch=2))
    kept = tmp_path / ("earlier_epoch_0" if resumes else "previous_1/epoch_0") / "precious.safetensors"
    assert kept.read_text() == "mine"
    assert not (tmp_path / "epoch_0" / "precious.safetensors").exists()
    assert json.loads((tmp_path / "epoch_0" / "training_progress.json").read_text())["progress"]["is_final"]


def test_what_a_kill_after_the_last_save_left_undone_is_done_when_the_run_is_resumed(
    tmp_path, tiny_config, run_recipe, monkeypatch
):
    """Between the rename and what follows it: no mark of the best, and checkpoints that nobody discards."""
    config = tiny_config(tmp_path, save_every_n_steps=1, max_steps_per_epoch=5, keep_last_n_checkpoints=1)
    config["dataset_val"] = dict(config["dataset"])
    config.update(run_val_every_n_steps=1, optimizer={"_component_": "torch.optim.SGD", "lr": 0.0})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "mark_best", lambda *args: None)
        patch.setattr(checkpoint_folder, "keep_newest", lambda *args: None)
        run_recipe(config)
    assert {p.name for p in tmp_path.glob("*_[0-9]")} == {"step_1", "step_2", "step_3", "step_4", "epoch_0"}
    recipe = run_recipe({**config, "resume_from_checkpoint": True})
    assert recipe.global_step == 5
    assert {p.name for p in tmp_path.glob("*_[0-9]")} == {"step_1", "epoch_0"}
    assert json.loads((tmp_path / "best_checkpoint.json").read_text())["folder"] == "step_1"


def with_input_in(config: dict, folder, key: str) -> None:
    """Let a config read its model, tokenizer or data from a folder."""
    if key == "checkpointer.checkpoint_dir":
        config["checkpointer"]["checkpoint_dir"] = str(folder)
    elif key == "tokenizer.path":
        config["tokenizer"]["path"] = str(folder / "tokenizer.json")
    elif key == "dataset.data_files":
        config["dataset"]["data_files"] = [str(folder / "train.jsonl")]
    else:
        config["dataset_val"] = {**config["dataset"], "data_files": str(folder / "*.jsonl")}


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize(
    "key", ["checkpointer.checkpoint_dir", "tokenizer.path", "dataset.data_files", "dataset_val.data_files"]
)
def test_a_run_that_would_move_its_own_input_away_is_refused_and_moves_nothing(
    key, resumes, tmp_path, tiny_world, tiny_config, run_recipe
):
    shutil.copytree(tiny_world / "model", tmp_path / "out" / "epoch_0")
    shutil.copy(tiny_world / "train.jsonl", tmp_path / "out" / "epoch_0")
    (tmp_path / "out" / "step_3").mkdir()
    before = sorted(tmp_path.rglob("*"))
    config = tiny_config(tmp_path / "out", resume_from_checkpoint=resumes)
    with_input_in(config, tmp_path / "out" / "epoch_0", key)
    with pytest.raises(UserError, match=rf"{key}.* is in .*epoch_0, which this run would move aside or write over"):
        run_recipe(config)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".gmt_tune.lock"] == before


def test_an_input_in_a_folder_that_the_run_leaves_alone_is_no_reason_to_refuse(
    tmp_path, tiny_world, tiny_config, run_recipe
):
    for name in ("base", "epoch_best"):
        shutil.copytree(tiny_world / "model", tmp_path / name)
    (tmp_path / "step_1").symlink_to(tmp_path / "base")  # to move a link does not move what it points to
    config = tiny_config(tmp_path, max_steps_per_epoch=1)
    with_input_in(config, tmp_path / "base", "checkpointer.checkpoint_dir")
    with_input_in(config, tmp_path / "epoch_best", "tokenizer.path")
    run_recipe(config)
    assert (tmp_path / "base" / "config.json").exists() and (tmp_path / "previous_1" / "step_1").is_symlink()


def test_a_checkpoint_that_the_config_reads_from_is_not_discarded(tmp_path, tiny_config, run_recipe):
    changes = dict(save_every_n_steps=1, keep_last_n_checkpoints=1, max_steps_per_epoch=4)
    run_recipe(tiny_config(tmp_path, **{**changes, "keep_last_n_checkpoints": None}))
    interrupted_at(tmp_path, 2)
    config = tiny_config(tmp_path, resume_from_checkpoint=True, **changes)
    config["checkpointer"]["checkpoint_dir"] = str(tmp_path / "step_1")
    config["checkpointer"]["checkpoint_files"] = ["model-00001-of-00001.safetensors"]
    run_recipe(config)
    assert {p.name for p in tmp_path.glob("*_[0-9]")} == {"step_1", "epoch_0"}


def test_an_output_dir_in_the_models_folder_is_refused_before_anything_is_moved(
    tmp_path, tiny_world, tiny_config, run_recipe
):
    shutil.copytree(tiny_world / "model", tmp_path / "model")
    (tmp_path / "model" / "epoch_0").mkdir()
    config = tiny_config(tmp_path / "model")
    config["checkpointer"]["checkpoint_dir"] = str(tmp_path / "model")
    with pytest.raises(UserError, match=r"checkpointer\.output_dir .* is in checkpointer\.checkpoint_dir"):
        run_recipe(config)
    assert (tmp_path / "model" / "epoch_0").is_dir()


@pytest.mark.parametrize("content", ["{}", "[1]", '{"num_attention_heads": null, "hidden_size": 64}'], ids=str)
def test_a_config_json_without_what_the_loader_needs_is_one_sentence(
    content, tmp_path, tiny_world, tiny_config, run_recipe
):
    shutil.copytree(tiny_world / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(content)
    config = tiny_config(tmp_path / "out")
    config["checkpointer"]["checkpoint_dir"] = str(tmp_path / "model")
    with pytest.raises(UserError, match=r"config\.json does not say num_attention_heads, num_key_value_heads"):
        run_recipe(config)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_config_json_says_the_dtype_that_was_saved(dtype, tmp_path, tiny_world, tiny_config, run_recipe):
    from transformers import AutoModelForCausalLM

    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    shutil.copytree(tiny_world / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    given = json.loads(file.read_text())
    given.pop("torch_dtype", None)
    file.write_text(json.dumps({**given, "dtype": "float16", "text_config": {"torch_dtype": "float16"}}))
    config = tiny_config(tmp_path / "out", dtype=dtype, max_steps_per_epoch=1)
    config["checkpointer"]["checkpoint_dir"] = str(tmp_path / "model")
    run_recipe(config)
    saved = json.loads((tmp_path / "out" / "epoch_0" / "config.json").read_text())
    assert saved == {**given, "dtype": name, "text_config": {"torch_dtype": name}}
    weights = load_all(tmp_path / "out" / "epoch_0")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{name}"}
    del saved["text_config"]
    (tmp_path / "out" / "epoch_0" / "config.json").write_text(json.dumps(saved))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "epoch_0")  # in the dtype that the config says
    assert torch.equal(model.state_dict()["model.norm.weight"], weights["model.norm.weight"])
    assert str(model.dtype) == f"torch.{name}"


def test_no_file_of_a_run_holds_a_secret_and_it_still_goes_on(tmp_path, tiny_config, monkeypatch):
    config = tiny_config(tmp_path / "out", max_steps_per_epoch=3, save_every_n_steps=1, write_report=True)
    config["metric_logger"].update(api_key="plain-s3cret", project="${oc.env:TEST_SECRET}")
    config["dataset"]["name"] = "${oc.env:TEST_SECRET}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for overrides in ((), ("resume_from_checkpoint=True",)):
        run = ForkedRun(tmp_path / "config.yaml", *overrides, environment={"TEST_SECRET": "from-the-environment"})
        assert run.wait(120) == [0], run.log.read_text()[-3000:]
        shutil.rmtree(tmp_path / "out" / "epoch_0")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()] + [run.log]
    assert {"training_progress.json", "run_log.jsonl", "torchtune_config.yaml"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        assert b"plain-s3cret" not in content and b"from-the-environment" not in content, file
    assert "Going on from" in run.log.read_text()
    run = ForkedRun(tmp_path / "config.yaml", *overrides, environment={"TEST_SECRET": "another-value"})
    assert run.wait(120) == [1]
    assert "dataset.name comes from the environment and is not what it was" in run.log.read_text()
