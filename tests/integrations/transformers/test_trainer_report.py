"""A Trainer's run leaves the files that ``gmt-tune report`` draws, and reporters get the mask by module and layer."""

import json

import pytest
from transformers import TrainerCallback

from gmt_tune.integrations.transformers import GradientMaskCallback
from gmt_tune.reporting.mask_metrics import is_group_metric
from gmt_tune.reporting.run_reader import read_run

MODULES = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MODULES |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


class Reporter(TrainerCallback):
    """Keeps the logs as it was handed them."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_reporters_get_groups_and_the_folder_holds_the_files(make_trainer, rows, tmp_path):
    reporter = Reporter()
    callback = GradientMaskCallback(density=0.2, dense=["*norm*"], track_selection_every=1)
    trainer = make_trainer([reporter, callback], max_steps=3)
    trainer.train()
    trainer.evaluate(rows[:4])
    last = [log for log in reporter.logs if "loss" in log][-1]
    for kind in ("density", "threshold", "overlap", "coverage"):
        assert {f"mask_{kind}_by_module/{module}" for module in MODULES} <= last.keys()
        assert {f"mask_{kind}_by_layer/layer_0{layer}" for layer in (0, 1)} <= last.keys()
    assert last["mask_density_by_layer/layer_01"] == pytest.approx(0.2, abs=0.02)
    assert 0 < last["mask/overlap"] < 1 and 0.2 < last["mask/coverage"] < 0.6

    run = read_run(tmp_path / "out")
    assert run.series["loss"].steps == [1, 2, 3] and run.series["lr"].last == 1e-2
    assert run.series["loss"].last == last["loss"] and run.series["mask/coverage"].last == last["mask/coverage"]
    assert run.series["val_loss"].steps == [3] and not any(map(is_group_metric, run.series))
    assert len(run.details["density"]) == 3 and "lm_head.weight" in run.details["density"][-1][1]
    assert run.config["gradient_mask"]["density"] == 0.2 and run.config["batch_size"] == 4


def test_reporters_do_not_get_groups_on_request(make_trainer, tmp_path):
    reporter = Reporter()
    make_trainer([reporter, GradientMaskCallback(density=0.2, log_by_group=False)], max_steps=2).train()
    assert "mask/threshold_max" in reporter.logs[0]
    assert not any(is_group_metric(name) for log in reporter.logs for name in log)
    assert len(read_run(tmp_path / "out").details["density"]) == 2


def test_a_checkpoints_own_log_is_drawn_too(make_trainer, tmp_path):
    """Where the run's files were not copied along, the state in a checkpoint has the curves."""
    trainer = make_trainer([GradientMaskCallback(density=0.2)], max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    run = read_run(tmp_path / "out" / "checkpoint-2")
    history = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert run.series["loss"].values == [log["loss"] for log in history if "loss" in log]


def test_a_wrong_tracking_interval_is_told_where_the_users_line_is():
    with pytest.raises(ValueError, match="track_selection_every must be a whole number of optimizer steps"):
        GradientMaskCallback(density=0.2, track_selection_every=0)
