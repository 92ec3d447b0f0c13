"""The mask's metrics reach everyone who listens to the Trainer's logs, and few of them the line that is printed."""

import ast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from gmt_tune.integrations.transformers import GradientMaskCallback

LINE = {"mask/density", "mask/seconds", "mask/threshold_median"}
METRICS = LINE | {"mask/threshold_min", "mask/threshold_max"}
GROUPS = {"mask_density_by_module/mlp.up_proj", "mask_threshold_by_layer/layer_01"}


class Reporter(TrainerCallback):
    """Keeps the logs as it was handed them, as W&B's or TensorBoard's callback does."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("how", ["to the constructor", "added late", "log_first"])
def test_callbacks_before_and_behind_get_all_numbers_and_the_printed_line_three(make_trainer, how, capsys):
    before, behind, mask = Reporter(), Reporter(), GradientMaskCallback(density=0.2)
    trainer = make_trainer([before, *([mask, behind] if how != "added late" else [])], max_steps=2)
    if how == "added late":
        trainer.add_callback(mask)
        trainer.add_callback(behind)
    if how == "log_first":
        mask.log_first(trainer)
    trainer.train()
    for logs in (before.logs, behind.logs):
        training = [log for log in logs if "loss" in log]
        assert len(training) == 2 and all((METRICS | GROUPS) <= log.keys() for log in training)
        assert all(0.15 < log["mask/density"] < 0.25 and log["mask/threshold_min"] > 0 for log in training)
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    for logs in (printed, trainer.state.log_history):
        training = [log for log in logs if "loss" in log]
        assert len(training) == 2
        assert all({name for name in log if name.startswith("mask")} == LINE for log in training)
    trainer.train()  # again: nothing is in the list twice
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.count("GradientMaskCallback") == names.count("ShortLine") == names.count("PrinterCallback") == 1
    assert names[0] == "GradientMaskCallback" and names[-2:] == ["ShortLine", "PrinterCallback"]
    assert "DefaultFlowCallback" in names


def test_tensorboard_gets_all_numbers_by_itself(make_trainer, tmp_path):
    out = tmp_path / "out"
    callbacks = [GradientMaskCallback(density=0.2)]
    make_trainer(callbacks, max_steps=2, report_to=["tensorboard"], output_dir=str(out)).train()
    (events,) = out.rglob("events.out.tfevents*")
    reported = EventAccumulator(str(events)).Reload()
    assert {f"train/{name}" for name in METRICS | GROUPS} <= set(reported.Tags()["scalars"])
    density = reported.Scalars("train/mask/density")
    assert [event.step for event in density] == [1, 2] and all(0.15 < event.value < 0.25 for event in density)


def test_evaluation_logs_stay_as_they_are(make_trainer, rows):
    trainer = make_trainer([GradientMaskCallback(density=0.2)], max_steps=1)
    trainer.train()
    metrics = trainer.evaluate(rows[:4])
    assert not METRICS & metrics.keys()
    assert not METRICS & trainer.state.log_history[-1].keys()


def test_a_log_of_several_steps_holds_the_last_steps_mask(make_trainer):
    callback = GradientMaskCallback(density=0.2)
    trainer = make_trainer([callback], max_steps=4, logging_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4]
    assert logs[-1]["mask/threshold_median"] == callback.mask.metrics()["mask/threshold_median"]
