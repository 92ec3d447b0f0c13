"""A run that was interrupted and resumed ends with the same losses and weights as one that was not."""

import json
import shutil

import pytest
import torch

from gmt_tune.errors import UserError

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2}

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
}


def interrupted_at(output_dir, step):
    """Take away every checkpoint behind a step, as if the run had been killed right after saving it."""
    for folder in list(output_dir.glob("step_*")) + list(output_dir.glob("epoch_*")):
        progress = json.loads((folder / "training_progress.json").read_text())["progress"]
        if progress["global_step"] > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_uninterrupted_one(
    variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights
):
    changes = dict(epochs=2, max_steps_per_epoch=5, save_every_n_steps=1, seed=3)
    changes.update(VARIANTS[variant])
    if changes["optimizer_in_bwd"] if "optimizer_in_bwd" in changes else False:
        changes.setdefault("optimizer", {"_component_": "torch.optim.AdamW", "lr": 1e-3})
    run_recipe(tiny_config(tmp_path / "straight", **changes))
    losses = [step["loss"] for step in logged_metrics(tmp_path / "straight")]
    wanted = final_weights(tmp_path / "straight", 1)

    half = len(losses) // 2
    for step in (2, half, half + 1):
        resumed = tmp_path / f"resumed_at_{step}"
        shutil.copytree(tmp_path / "straight", resumed)
        (resumed / "logs" / "log.txt").unlink()
        interrupted_at(resumed, step)
        recipe = run_recipe(tiny_config(resumed, resume_from_checkpoint=True, **changes))
        assert [s["loss"] for s in logged_metrics(resumed)] == losses[step:], f"losses after step {step}"
        weights = final_weights(resumed, 1)
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted), f"weights, resumed at {step}"
        assert recipe._mask.step == len(losses)


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
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= names
    AutoModelForCausalLM.from_pretrained(tmp_path / "epoch_0")
    AutoModelForCausalLM.from_pretrained(tmp_path / "step_2")


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no manifest"])
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
    elif damage == "missing":
        (run / "step_3" / "training_state_rank0.pt").unlink()
    else:
        (run / "step_3" / "training_progress.json").write_text("{")
    caplog.set_level("INFO")
    run_recipe(tiny_config(run, resume_from_checkpoint=True, **changes))
    if damage != "no manifest":
        assert "step_3 is damaged" in caplog.text
    assert f"Going on from {run / 'step_2'}" in caplog.text
    weights = final_weights(run)
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_only_the_newest_checkpoints_and_the_best_are_kept(tmp_path, tiny_config, run_recipe):
    config = tiny_config(tmp_path, save_every_n_steps=1, max_steps_per_epoch=8, keep_last_n_checkpoints=2)
    config["dataset_val"] = dict(config["dataset"])
    run_recipe({**config, "run_val_every_n_steps": 1, "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.0}})
    kept = sorted(path.name for path in tmp_path.iterdir() if (path / "training_progress.json").exists())
    best = json.loads((tmp_path / "best_checkpoint.json").read_text())
    assert best["folder"] == "step_1"  # with a learning rate of zero, none is better than the first
    assert kept == ["epoch_0", "step_1", "step_7"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"gradient_mask": {**MASK, "density": 0.5}}, r"gradient_mask\.density is 0\.5, was 0\.2"),
        (
            {"optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-3}},
            r"optimizer\._component_ is 'torch\.optim\.SGD'",
        ),
        ({"batch_size": 2}, r"batch_size is 2, was 4"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_checkpoint_says_what_differs(change, said, tmp_path, tiny_config, run_recipe):
    changes = dict(gradient_mask=MASK, save_every_n_steps=2)
    run_recipe(tiny_config(tmp_path, **changes))
    with pytest.raises(UserError, match=said):
        run_recipe(tiny_config(tmp_path, resume_from_checkpoint=True, **{**changes, **change}))


def test_a_new_run_moves_the_checkpoints_of_an_earlier_one_aside(tmp_path, tiny_config, run_recipe):
    run_recipe(tiny_config(tmp_path, save_every_n_steps=2, max_steps_per_epoch=4))
    run_recipe(tiny_config(tmp_path, max_steps_per_epoch=2))
    assert {p.name for p in (tmp_path / "previous_1").iterdir()} >= {"epoch_0", "step_2"}
    assert not (tmp_path / "step_2").exists() and (tmp_path / "epoch_0").exists()
