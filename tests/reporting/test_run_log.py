"""The run log: what is written is what is read, whatever happens to the run in between."""

import json
import logging
import math
import os
import stat

import pytest

from gmt_tune.reporting import run_log
from gmt_tune.reporting.run_log import MASK_DETAIL_FILE, RUN_LOG_FILE, RunLog
from gmt_tune.reporting.run_reader import read_run, read_runs


def test_numbers_come_back_as_they_were_logged(tmp_path):
    log = RunLog(tmp_path, {"seed": 3})
    log.truncate_after(0)
    log.log(1, {"loss": 0.1 + 0.2, "val_loss": 1e-300})
    log.log(2, {"loss": math.nan, "grad_norm": math.inf})
    log.log(2, {"val_loss": -math.inf})
    run = read_run(tmp_path)
    assert run.config == {"seed": 3}
    assert run.series["loss"].steps == [1, 2]
    assert run.series["loss"].values[0] == 0.1 + 0.2 and math.isnan(run.series["loss"].values[1])
    assert run.series["grad_norm"].values == [math.inf]
    assert run.series["val_loss"].values == [1e-300, -math.inf]
    for line in (tmp_path / RUN_LOG_FILE).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_line_torn_by_a_kill_costs_that_line_alone(tmp_path):
    log = RunLog(tmp_path)
    log.truncate_after(0)
    log.log(1, {"loss": 2.0})
    log.log(2, {"loss": 1.5})
    path = tmp_path / RUN_LOG_FILE
    path.write_bytes(path.read_bytes()[:-9])
    log.log(3, {"loss": 1.25})
    assert read_run(tmp_path).series["loss"].steps == [1, 3]


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    log.truncate_after(0)
    for step in range(1, 6):
        log.log(step, {"loss": float(step)})
        log.log_mask(step, lambda step=step: {"density": {"w": step / 10}})
    resumed = RunLog(tmp_path, {"epochs": 2})
    resumed.truncate_after(3)
    resumed.log(4, {"loss": 40.0})
    resumed.log_mask(4, lambda: {"density": {"w": 0.9}})
    run = read_run(tmp_path)
    assert run.series["loss"].steps == [1, 2, 3, 4] and run.series["loss"].last == 40.0
    logged = [(step, numbers["w"]) for step, numbers in run.details["density"]]
    assert logged == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.9),
    ]
    assert run.config == {"epochs": 2}
    RunLog(tmp_path).truncate_after(0)
    assert len((tmp_path / RUN_LOG_FILE).read_text().splitlines()) == 1  # a new run: the header


def test_detail_grows_with_the_logarithm_of_the_run(tmp_path):
    log = RunLog(tmp_path)
    log.truncate_after(0)
    asked = []
    for step in range(1, 20001):
        log.log_mask(step, lambda step=step: asked.append(step) or {"density": {"w": 0.2}})
    assert asked[:63] == list(range(1, 64))
    # 1/32 more steps from each to the next: 32 lines for each factor e
    assert len(asked) == pytest.approx(63 + 32 * math.log(20000 / 64), rel=0.05)
    assert len((tmp_path / MASK_DETAIL_FILE).read_text().splitlines()) == len(asked) + 1


def test_secrets_of_a_config_are_not_written(tmp_path):
    config = {"metric_logger": {"wandb_api_key": "s3cret", "log_dir": "x"}, "tokens": [{"hf_token": "s3cret"}]}
    RunLog(tmp_path, config).truncate_after(0)
    assert "s3cret" not in (tmp_path / RUN_LOG_FILE).read_text()


def test_a_log_that_is_no_log_costs_no_run(tmp_path):
    """Lines that are none of ours, and a pipe, from which nobody would ever read anything."""
    path = tmp_path / RUN_LOG_FILE
    path.write_text('{"step": "two"}\n{"step": 1, "loss": 3.0}\n' + "[" * 100_000 + '\n{"step": null}\n')
    os.mkfifo(tmp_path / MASK_DETAIL_FILE)
    log = RunLog(tmp_path)
    log.truncate_after(1)
    log.log(2, {"loss": 2.0})
    assert read_run(tmp_path).series["loss"].steps == [1, 2]
    assert (tmp_path / MASK_DETAIL_FILE).is_file()


def test_a_log_that_cannot_be_read_is_left_as_it_is(tmp_path, monkeypatch, caplog):
    log = RunLog(tmp_path)
    log.truncate_after(0)
    log.log(1, {"loss": 2.0})

    def failing(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(run_log, "read_lines", failing)
        RunLog(tmp_path).truncate_after(1)
    assert read_run(tmp_path).series["loss"].steps == [1] and "the run goes on without it" in caplog.text


def test_modes_of_the_logs_follow_umask(tmp_path):
    before = os.umask(0o002)
    try:
        log = RunLog(tmp_path)
        log.truncate_after(0)
        log.log(1, {"loss": 2.0})
        (tmp_path / RUN_LOG_FILE).unlink()
        run_log._append_line(tmp_path / RUN_LOG_FILE, {"step": 1})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o664}


def test_a_folder_that_cannot_be_written_is_warned_about_once_and_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    log = RunLog(tmp_path / "file" / "folder")
    with caplog.at_level(logging.WARNING):
        log.truncate_after(0)
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 1.0})
    assert len(caplog.records) == 1 and "the run goes on without it" in caplog.text


@pytest.mark.parametrize("resumed_in_a_new_file", [False, True])
def test_torchtunes_own_logs_are_read_with_a_resumed_run_taking_over(tmp_path, resumed_in_a_new_file):
    first = "Step 1 | loss:3.0 lr:1e-05 \nStep 2 | loss:2.5 lr:2e-05 \nStep 3 | loss:9.0 lr:3e-05 \n"
    second = "Step 2 | loss:2.0 lr:2e-05 \nStep 3 | loss:1.5 lr:nan \nStep 4 | lo"
    (tmp_path / "logs").mkdir()
    if resumed_in_a_new_file:
        (tmp_path / "logs" / "log_1.txt").write_text(first)
        (tmp_path / "logs" / "log_2.txt").write_text(second)
    else:
        (tmp_path / "logs" / "log_1.txt").write_text(first + second)
    run = read_run(tmp_path)
    assert (run.series["loss"].steps, run.series["loss"].values) == ([1, 2, 3], [3.0, 2.0, 1.5])


def test_a_trainers_log_is_read_from_its_newest_checkpoint(tmp_path):
    for step in (2, 4):
        history = [{"step": s, "loss": 5.0 - s, "learning_rate": 0.1, "epoch": 1} for s in range(1, step + 1)]
        history.append({"step": step, "eval_loss": 1.0, "eval_runtime": 3.0})
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run = read_run(tmp_path)
    assert run.series["loss"].values == [4.0, 3.0, 2.0, 1.0]
    assert run.series.keys() == {"loss", "lr", "val_loss"}


def test_runs_get_the_shortest_names_that_tell_them_apart(tmp_path):
    folders = [tmp_path / "a" / "out", tmp_path / "b" / "out", tmp_path / "b" / "other"]
    for folder in folders:
        RunLog(folder).log(1, {"loss": 1.0})
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/out", "b/out", "other", "a/out (2)"]


def test_secrets_that_another_program_has_logged_do_not_reach_a_report(tmp_path):
    (tmp_path / "log_1.txt").write_text("Step 1 | loss:3.0 \n")
    (tmp_path / "torchtune_config.yaml").write_text("dataset: {source: 'https://me:s3cret@host', hf_token: s3cret}\n")
    assert read_run(tmp_path).config == {"dataset": {"source": "https://***@host", "hf_token": "***"}}
