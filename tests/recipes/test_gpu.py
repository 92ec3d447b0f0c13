"""What the recipes promise, kept on a GPU: torchtune's numbers without a mask, resuming, NCCL, the quickstart."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

pytestmark = pytest.mark.needs_gpu

ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "fused": True}
ADAMW_8BIT = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}
MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": []}
COMPACT = dict(
    optimizer={"_component_": "gmt_tune.CompactAdamW", "lr": 1e-3, "state_bits": 8, "bf16_stochastic_round": True},
    gradient_mask={**MASK, "refresh_every": 4, "dense": ["*norm*"]},
    dtype="bf16",
    gradient_accumulation_steps=2,
    clip_grad_norm=1.0,
)

PARITY = {
    "fp32, accumulation, clipping": dict(optimizer=ADAMW, gradient_accumulation_steps=2, clip_grad_norm=0.5),
    "8-bit, bf16": dict(optimizer=ADAMW_8BIT, dtype="bf16"),
    "optimizer in backward": dict(optimizer=ADAMW, optimizer_in_bwd=True),
    "activations offloaded": dict(
        optimizer=ADAMW, dtype="bf16", enable_activation_checkpointing=True, enable_activation_offloading=True
    ),
}
RESUME = {
    "fp32, written in the background": dict(enable_async_checkpointing=True),
    "inside a refresh interval, 8-bit, bf16": dict(
        gradient_mask={**MASK, "refresh_every": 4},
        optimizer={**ADAMW_8BIT, "bf16_stochastic_round": True},
        dtype="bf16",
    ),
    "compact, inside a refresh interval": COMPACT,
    "random, optimizer in backward": dict(gradient_mask={**MASK, "score": "random"}, optimizer_in_bwd=True),
}


def assert_same_weights(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.parametrize("variant", PARITY)
def test_density_one_equals_torchtunes_recipe(
    variant, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights
):
    changes = dict(PARITY[variant], device="cuda")
    base = "distributed" if "optimizer_in_bwd" in changes else "single_device"
    run_recipe(tiny_config(tmp_path / "torchtune", **changes), base=base)
    run_recipe(tiny_config(tmp_path / "ours", gradient_mask={**MASK, "density": 1.0}, **changes))
    losses = [[step["loss"] for step in logged_metrics(tmp_path / name)] for name in ("torchtune", "ours")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert_same_weights(final_weights(tmp_path / "ours"), final_weights(tmp_path / "torchtune"))


@pytest.mark.parametrize("variant", RESUME)
def test_resumed_run_equals_uninterrupted_one(variant, tmp_path, tiny_config, run_recipe, final_weights):
    changes = dict(gradient_mask=MASK, device="cuda", save_every_n_steps=2, max_steps_per_epoch=6, optimizer=ADAMW)
    changes |= RESUME[variant]
    run_recipe(tiny_config(tmp_path, **changes))
    wanted = final_weights(tmp_path)
    for folder in [*tmp_path.glob("step_*"), *tmp_path.glob("epoch_*")]:
        if json.loads((folder / "training_progress.json").read_text())["progress"]["global_step"] > 2:
            shutil.rmtree(folder)
    recipe = run_recipe(tiny_config(tmp_path, resume_from_checkpoint=True, **changes))
    assert recipe._mask.step == 6
    assert_same_weights(final_weights(tmp_path), wanted)


@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_one_rank_under_torchrun_equals_one_process(
    kind, tmp_path, tiny_config, run_tune, final_weights, logged_metrics
):
    """NCCL and FSDP2. One rank has whole gradients; gpu.sh's part "sharded" searches such as shards are."""
    changes = COMPACT if kind == "compact" else dict(gradient_mask=MASK, optimizer=ADAMW, dtype="bf16")
    for name, launcher in (("alone", []), ("torchrun", ["--nproc_per_node", "1"])):
        config = tiny_config(tmp_path / name, device="cuda", **changes)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        run_tune("run", *launcher, "gmt_full_finetune", "--config", f"{name}.yaml", cwd=tmp_path)
    assert logged_metrics(tmp_path / "alone")[-1]["loss"] == logged_metrics(tmp_path / "torchrun")[-1]["loss"]
    assert_same_weights(final_weights(tmp_path / "torchrun"), final_weights(tmp_path / "alone"))


def test_a_compiled_model_trains(tmp_path, tiny_config, run_tune, logged_metrics):
    config = tiny_config(tmp_path / "out", gradient_mask=MASK, optimizer=ADAMW, device="cuda", compile=True)
    (tmp_path / "compiled.yaml").write_text(yaml.safe_dump(config))
    run_tune("run", "gmt_full_finetune", "--config", "compiled.yaml", cwd=tmp_path)
    losses = [step["loss"] for step in logged_metrics(tmp_path / "out")]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_quickstart_learns(dtype, tmp_path, run_tune):
    output = run_tune(
        *("run", "gmt_full_finetune", "--config", "quickstart"),
        *("device=cuda", f"dtype={dtype}", f"output_dir={tmp_path / 'out'}", "log_peak_memory_stats=True"),
        cwd=tmp_path,
        timeout=600,
    ).stdout
    accuracy = {when: float(value) for when, value in re.findall(r"accuracy (before|after): (\S+)", output)}
    assert accuracy["before"] < 0.2 and accuracy["after"] > 0.8
    assert (Path(tmp_path) / "out" / "report.html").is_file()


def test_quickstart_of_dpo_runs(tmp_path, run_tune):
    arguments = ("device=cuda", f"output_dir={tmp_path / 'out'}", "max_steps_per_epoch=5", "epochs=1")
    run_tune("run", "gmt_full_dpo", "--config", "quickstart_dpo", *arguments, cwd=tmp_path, timeout=600)
    assert list((tmp_path / "out").glob("epoch_0/*.safetensors"))
