"""The mask's metrics reach everyone who listens to the Trainer's logs."""

import logging

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from gmt_tune.integrations.transformers import GradientMaskCallback

METRICS = {"mask/density", "mask/seconds", "mask/threshold_min", "mask/threshold_median", "mask/threshold_max"}


class Reporter(TrainerCallback):
    """Keeps the logs as it was handed them, as W&B's or TensorBoard's callback does."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("added_late", [False, True])
def test_reporters_before_and_behind_the_callback_receive_the_metrics_on_request(make_trainer, added_late):
    before, behind, mask = Reporter(), Reporter(), GradientMaskCallback(density=0.2)
    if added_late:
        trainer = make_trainer([before], max_steps=2)
        trainer.add_callback(mask)
        trainer.add_callback(behind)
    else:
        trainer = make_trainer([before, mask, behind], max_steps=2)
    mask.log_first(trainer)
    trainer.train()
    for logs in (before.logs, behind.logs, trainer.state.log_history):
        training = [log for log in logs if "loss" in log]
        assert len(training) == 2 and all(METRICS <= log.keys() for log in training)
        assert all(0.15 < log["mask/density"] < 0.25 and log["mask/threshold_min"] > 0 for log in training)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.count("GradientMaskCallback") == 1 and "DefaultFlowCallback" in names


def test_a_reporter_that_will_not_get_the_metrics_is_named(make_trainer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for asks in (False, True):
        folder = tmp_path / str(asks)
        mask = GradientMaskCallback(density=0.2)
        trainer = make_trainer([mask], max_steps=1, report_to=["tensorboard"], output_dir=str(folder))
        if asks:
            mask.log_first(trainer)
        trainer.train()
        (events,) = folder.rglob("events.out.tfevents*")
        reported = EventAccumulator(str(events)).Reload().Tags()["scalars"]
        assert "train/loss" in reported and ("train/mask/density" in reported) == asks
    assert caplog.text.count("tensorboard will not get the metrics of the gradient mask") == 1


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
    assert logs[-1]["mask/threshold_max"] == callback.mask.metrics()["mask/threshold_max"]
