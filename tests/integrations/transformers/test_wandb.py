"""W&B, offline, gets all numbers of the mask: from the Trainer by itself, and from a recipe by its metric logger.

Slow, and skipped where the package is missing: pip install wandb, in an environment of its own.
"""

import json

import pytest

from gmt_tune.integrations.transformers import GradientMaskCallback

pytestmark = pytest.mark.slow
wandb = pytest.importorskip("wandb", reason="it is not installed: pip install wandb")

TOTALS = {"mask/density", "mask/seconds", "mask/threshold_min", "mask/threshold_median", "mask/threshold_max"}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")


def records(data: bytes):
    """The records of a log in LevelDB's format, which W&B's files have behind 7 bytes of their own."""
    at, parts = 7, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # of a block, too little for a header
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield b"".join(parts)
            parts = []


def history(folder) -> list[dict]:
    """What an offline run logged, from the one file that it leaves for ``wandb sync``."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.rglob("*.wandb")
    lines = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


def test_the_trainer_gives_it_all_numbers(make_trainer, tmp_path):
    make_trainer([GradientMaskCallback(density=0.2)], max_steps=2, report_to=["wandb"]).train()
    wandb.finish()
    steps = [line for line in history(tmp_path) if "train/loss" in line]
    wanted = {*TOTALS, "mask_density_by_module/mlp.up_proj", "mask_threshold_by_layer/layer_01"}
    assert len(steps) == 2 and all({f"train/{name}" for name in wanted} <= step.keys() for step in steps)
    assert all(0.15 < step["train/mask/density"] < 0.25 for step in steps)


def test_a_recipes_metric_logger_gives_it_all_numbers(run_tune, tmp_path):
    run_tune(
        "run", "gmt_full_finetune", "--config", "quickstart", f"output_dir={tmp_path / 'out'}", "epochs=1",
        "max_steps_per_epoch=2", "evaluation.size=8", "lr_scheduler.num_warmup_steps=1",
        "metric_logger._component_=torchtune.training.metric_logging.WandBLogger", "metric_logger.project=a_test",
        cwd=tmp_path,
    )  # fmt: skip
    steps = [line for line in history(tmp_path) if "loss" in line]
    wanted = {*TOTALS, "mask/coverage", "mask_density_by_module/mlp.w1", "mask_threshold_by_layer/layer_01"}
    assert len(steps) == 2 and all(wanted <= step.keys() for step in steps)
