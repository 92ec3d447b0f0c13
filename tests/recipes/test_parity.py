"""Without a mask, and with density 1.0, training equals torchtune's own recipe bit for bit.

The reference is its single-device recipe. Only for the optimizer in backward it is the distributed one on
one process, since the other does not normalise the loss by the token count there.
"""

from pathlib import Path

import pytest
import torch
import torchtune
from omegaconf import OmegaConf

ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "fused": True}
ADAMW_8BIT = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}
DENSITY_ONE = {"_component_": "gmt_tune.GradientMask", "density": 1.0}

VARIANTS = {
    "adamw, accumulation, clipping, activation checkpointing": dict(
        optimizer=ADAMW, gradient_accumulation_steps=2, clip_grad_norm=0.5, enable_activation_checkpointing=True
    ),
    "adamw 8-bit, accumulation, clipping, activation checkpointing": dict(
        optimizer=ADAMW_8BIT, gradient_accumulation_steps=2, clip_grad_norm=0.5, enable_activation_checkpointing=True
    ),
    "optimizer in backward": dict(optimizer=ADAMW, optimizer_in_bwd=True),
    "bf16, two epochs": dict(dtype="bf16", epochs=2, max_steps_per_epoch=2),
    # 16 micro-batches an epoch: the last is applied with the next epoch's first step
    "two epochs with a micro-batch left over": dict(epochs=2, gradient_accumulation_steps=3, max_steps_per_epoch=None),
    "packed data, unchunked loss": dict(
        loss={"_component_": "torch.nn.CrossEntropyLoss"}, batch_size=1, dataset_packed=True
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_weights_equal_torchtunes_recipe(
    variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights, eager
):
    train_and_compare(variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "8-bit" in name])
def test_losses_and_weights_equal_torchtunes_recipe_with_compiled_optimizers(
    variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights
):
    train_and_compare(variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights)


def train_and_compare(variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights):
    changes = dict(VARIANTS[variant])
    packed = changes.pop("dataset_packed", False)
    in_backward = changes.get("optimizer_in_bwd", False)

    def make(name, **more):
        config = tiny_config(tmp_path / name, **changes, **more)
        config["dataset"]["packed"] = packed
        return config

    run_recipe(make("torchtune"), base="distributed" if in_backward else "single_device")
    run_recipe(make("no_mask"))
    run_recipe(make("density_one", gradient_mask=DENSITY_ONE))

    wanted_losses = [step["loss"] for step in logged_metrics(tmp_path / "torchtune")]
    assert len(wanted_losses) >= 4 and len(set(wanted_losses)) == len(wanted_losses)
    last = changes.get("epochs", 1) - 1
    wanted = final_weights(tmp_path / "torchtune", last)
    for name in ("no_mask", "density_one"):
        assert [step["loss"] for step in logged_metrics(tmp_path / name)] == wanted_losses
        weights = final_weights(tmp_path / name, last)
        assert weights.keys() == wanted.keys()
        for key in wanted:
            assert torch.equal(weights[key], wanted[key]), (name, key)


@pytest.mark.parametrize("name", ["llama3_2/1B_full_single_device", "qwen2_5/0.5B_full"])
def test_a_config_that_torchtune_ships_trains_as_by_its_own_recipe(
    name, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights, caplog, monkeypatch
):
    """Edited as its user would for a small model on a CPU; all other keys are those of the file."""
    monkeypatch.chdir(tmp_path)
    shipped = OmegaConf.load(Path(torchtune.__file__).parents[1] / "recipes" / "configs" / f"{name}.yaml")
    for who, base in (("torchtune", "single_device"), ("ours", None)):
        mine = tiny_config(tmp_path / who)
        edits = {key: mine[key] for key in ("output_dir", "model", "tokenizer", "checkpointer", "dataset")}
        edits |= {"optimizer": ADAMW, "metric_logger": mine["metric_logger"], "optimizer_in_bwd": False}
        edits |= dict(device="cpu", dtype="fp32", max_steps_per_epoch=3, enable_activation_offloading=False)
        edits |= dict(seed=5, enable_activation_checkpointing=False, gradient_accumulation_steps=2)
        caplog.clear()
        run_recipe({**OmegaConf.to_container(shipped), **edits}, base=base)
    assert "The config has no section gradient_mask: all entries are trained" in caplog.text
    losses = [[step["loss"] for step in logged_metrics(tmp_path / who)] for who in ("torchtune", "ours")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    wanted, found = final_weights(tmp_path / "torchtune"), final_weights(tmp_path / "ours")
    assert wanted.keys() == found.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_mask_changes_the_weights(tmp_path, tiny_config, run_recipe, final_weights):
    """What shows that the test above can fail."""
    run_recipe(tiny_config(tmp_path / "dense"))
    run_recipe(tiny_config(tmp_path / "masked", gradient_mask={"_component_": "gmt_tune.GradientMask", "density": 0.2}))
    dense, masked = final_weights(tmp_path / "dense"), final_weights(tmp_path / "masked")
    assert any(not torch.equal(dense[key], masked[key]) for key in dense)
