"""What the training loop does besides training: rows without a token to learn, what is left over, how a run ends."""

import json
import logging
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from gmt_tune.errors import UserError, UserErrorOfOneRank
from gmt_tune.integrations.torchtune.run import entry
from gmt_tune.integrations.torchtune.run.profiling import RunProfiler
from gmt_tune.integrations.torchtune.run.signals import SIGNALS, StopRun, StopSignal
from gmt_tune.integrations.torchtune.run.step_numbers import StepNumbers

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": []}
UNCHUNKED = {"_component_": "torch.nn.CrossEntropyLoss"}
TOO_LONG = {"question": "word " * 300, "answer": "A"}  # its question fills max_seq_len


@pytest.fixture
def config_on(tiny_config, tmp_path):
    """Function that gives the config of a run on some rows, in their order, one at a time."""

    def make(name: str, rows: list[dict], **changes) -> dict:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        packed = changes.pop("packed", False)
        defaults = dict(shuffle=False, batch_size=1, max_steps_per_epoch=None, lr_scheduler=None)
        config = tiny_config(tmp_path / name, **{**defaults, **changes})
        config["dataset"].update(data_files=str(file), packed=packed)
        return config

    return make


def rows(count: int) -> list[dict]:
    return [{"question": f"What is {i} plus 1?", "answer": f"{i} plus 1 is {i + 1}. " * (i + 1)} for i in range(count)]


@pytest.mark.parametrize("loss", [None, UNCHUNKED], ids=["chunked", "unchunked"])
def test_a_micro_batch_without_a_token_in_the_loss_adds_nothing_to_the_step(
    loss, tmp_path, config_on, run_recipe, logged_metrics, final_weights
):
    """The yardstick is torchtune's recipe with both rows of a step in one batch, where it ignores such a row."""
    data = [*rows(2), TOO_LONG, *rows(3)[2:]]
    changes = {"loss": loss} if loss else {}
    run_recipe(config_on("ours", data, gradient_accumulation_steps=2, clip_grad_norm=1.0, **changes))
    run_recipe(config_on("theirs", data, batch_size=2, clip_grad_norm=1.0, **changes), base="single_device")
    for key in ("loss", "grad_norm"):
        found, wanted = ([step[key] for step in logged_metrics(tmp_path / name)] for name in ("ours", "theirs"))
        assert len(wanted) == 2 and all(map(math.isfinite, wanted))
        assert found == pytest.approx(wanted, rel=1e-5), key
    weights, others = final_weights(tmp_path / "ours"), final_weights(tmp_path / "theirs")
    assert weights.keys() == others.keys() and len(weights) > 5
    for key, weight in weights.items():
        assert torch.isfinite(weight).all() and (weight - others[key]).abs().median() < 1e-6, key


@pytest.mark.parametrize("changes", [{}, {"optimizer_in_bwd": True}, {"loss": UNCHUNKED}, {"packed": True}], ids=str)
def test_a_step_without_a_token_in_the_loss_names_its_rows_and_the_length(changes, config_on, run_recipe):
    config = config_on("out", [*rows(1), TOO_LONG], gradient_mask=MASK, save_every_n_steps=1, **changes)
    which = r"packs \[1\] of the data set \(rows 1\)" if "packed" in changes else r"rows \[1\] of the data set"
    message = rf"no token of step 2 is in the loss, {which}: .* tokenizer\.max_seq_len 128: raise it, or delete.*step_1"
    with pytest.raises(UserError, match=message):
        run_recipe(config)


def test_a_step_without_a_token_in_the_loss_is_left_out_on_request(tmp_path, config_on, run_recipe, logged_metrics):
    run_recipe(config_on("out", [*rows(1), TOO_LONG, *rows(1)], on_nonfinite="skip"))
    steps = logged_metrics(tmp_path / "out")
    assert [step["skipped_steps"] for step in steps] == [0, 1, 1] and math.isfinite(steps[2]["loss"])


def test_held_out_rows_without_a_token_in_the_loss_count_nothing(tmp_path, config_on, run_recipe, logged_metrics):
    losses = []
    for name, held_out in (("with", [*rows(2), TOO_LONG]), ("without", rows(2))):
        (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
        config = config_on(name, rows(1))
        config["dataset_val"] = {**config["dataset"], "data_files": str(tmp_path / "held_out.jsonl")}
        run_recipe(config)
        losses += [step["val_loss"] for step in logged_metrics(tmp_path / name) if "val_loss" in step]
    assert len(losses) == 2 and losses[0] == losses[1] > 0


def test_held_out_rows_that_have_no_token_in_the_loss_at_all_are_reported(config_on, run_recipe, tmp_path, caplog):
    (tmp_path / "held_out.jsonl").write_text(json.dumps(TOO_LONG) + "\n")
    config = config_on("out", rows(1))
    config["dataset_val"] = {**config["dataset"], "data_files": str(tmp_path / "held_out.jsonl")}
    caplog.set_level(logging.INFO)
    run_recipe(config)
    assert "No token of dataset_val is in the loss, so val_loss is NaN: raise tokenizer.max_seq_len" in caplog.text


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_are_named_for_a_nan_are_those_that_were_in_the_step(
    packed, config_on, run_recipe, gmt_recipe, monkeypatch
):
    """Of five micro-batches, two to a step, the last is left over and applied with the next epoch's first two."""
    take = gmt_recipe._loss

    def loss_with_nan(self, batch):
        is_last = self._micro_batches[-1] == (0, 4)
        return take(self, batch) * (math.nan if is_last else 1.0)

    monkeypatch.setattr(gmt_recipe, "_loss", loss_with_nan)
    data = rows(5)
    if packed:  # each row fills a pack of its own but the first two, which share one
        data = [*rows(2), *[{**row, "question": "word " * 18} for row in rows(6)[2:]]]
    config = config_on("out", data, gradient_accumulation_steps=2, epochs=2, packed=packed)
    where = r"packs \[0, 1, 4\] of the data set \(rows 0-1, 2, 5\)" if packed else r"rows \[0, 1, 4\] of the data set"
    with pytest.raises(UserError, match=rf" holds NaN or infinity at step 3, {where}; no weight was changed"):
        run_recipe(config)


def test_a_run_goes_on_exactly_where_an_epoch_has_left_a_micro_batch_over(
    tmp_path, tiny_config, run_recipe, logged_metrics, final_weights
):
    """The left-over one is trained on again behind the epoch's checkpoint, which does not hold its gradient."""
    changes = dict(epochs=2, gradient_accumulation_steps=3, max_steps_per_epoch=None, gradient_mask=MASK)
    run_recipe(tiny_config(tmp_path / "straight", **changes))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "epoch_1")
    (tmp_path / "resumed" / "logs" / "log.txt").unlink()
    run_recipe(tiny_config(tmp_path / "resumed", resume_from_checkpoint=True, **changes))
    straight, resumed = ([step["loss"] for step in logged_metrics(tmp_path / name)] for name in ("straight", "resumed"))
    assert len(straight) == 10 and resumed == straight[5:]
    wanted, found = (final_weights(tmp_path / name, 1) for name in ("straight", "resumed"))
    assert wanted and all(torch.equal(found[key], wanted[key]) for key in wanted)


def make_recipe(gmt_recipe, **attributes):
    """A recipe that is not set up, of which single methods are called."""
    recipe = object.__new__(gmt_recipe)
    defaults = dict(
        world_size=1, rank=0, tensor_parallel_dim=1, global_step=1, _is_rank_zero=True, _mask=None, _logs=None,
        _device=torch.device("cpu"), _log_every_n_steps=100, _stop=StopSignal(), _profiler=RunProfiler(None),
        _checkpoints=SimpleNamespace(close=lambda: None), _stops=torch.tensor(0), _must_stop=False,
        _numbers=StepNumbers(), _finite=SimpleNamespace(end_step=lambda: None), _reads_late=False, _window_tokens=0,
        _tokens=0,
    )  # fmt: skip
    for name, value in {**defaults, **attributes}.items():
        setattr(recipe, name, value)
    return recipe


@pytest.fixture
def shown_step(gmt_recipe, monkeypatch):
    """Function that gives what is shown of a step of two seconds, in which each of a recipe's ranks has counted."""

    def show(**attributes) -> tuple:
        shown = []
        progress = SimpleNamespace(update=lambda *args: shown.append(args))
        recipe = make_recipe(gmt_recipe, _progress=progress, _window_start=1.0, **attributes)
        monkeypatch.setattr("gmt_tune.integrations.torchtune.run.masked_recipe.time.perf_counter", lambda: 3.0)
        recipe._log_step(torch.tensor(1.0), torch.tensor(400), None)
        monkeypatch.undo()
        return shown[0]

    return show


@pytest.mark.parametrize(("tensor_parallel_dim", "tokens"), [(1, 200.0), (2, 100.0), (4, 50.0)])
def test_tokens_count_once_however_many_ranks_share_a_row(tensor_parallel_dim, tokens, shown_step):
    """Each of four ranks has counted 100 tokens."""
    assert shown_step(world_size=4, tensor_parallel_dim=tensor_parallel_dim) == (1, 1.0, tokens, None)


@pytest.mark.parametrize(("device", "share"), [("cpu", 0.25), ("cuda", None)])
def test_the_masks_time_is_a_share_of_the_steps_only_where_the_host_waits_for_it(device, share, shown_step):
    step = shown_step(_device=torch.device(device), _mask=SimpleNamespace(seconds=0.5))
    assert step == (1, 1.0, 200.0, share)


def test_the_memory_history_lasts_as_long_as_the_profilers_active_steps(monkeypatch):
    calls, steps = [], []
    torchtunes = SimpleNamespace(start=lambda: None, step=lambda: None, stop=lambda: calls.append("profiler stopped"))
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda enabled: calls.append((len(steps), enabled))
    )

    def train(profiler, count):
        steps.clear()
        profiler.start()
        for number in range(count):
            steps.append(number)
            profiler.step()

    train(RunProfiler(torchtunes, range(8, 10)), 30)
    assert calls == [(8, "all"), (10, None)]
    calls.clear()
    profiler = RunProfiler(torchtunes, range(0, 10))
    train(profiler, 9)  # and the run ends
    profiler.stop()
    profiler.stop()
    assert calls == [(0, "all"), (9, None), "profiler stopped"]


def profiler_of(tmp_path) -> dict:
    return {
        "_component_": "torchtune.training.setup_torch_profiler", "enabled": True, "cpu": True, "cuda": False,
        "xpu": False, "output_dir": str(tmp_path / "traces"), "wait_steps": 0, "warmup_steps": 0, "active_steps": 50,
        "num_cycles": 1, "profile_memory": False, "with_stack": False,
    }  # fmt: skip


@pytest.mark.parametrize("end", ["complete", "asked to stop", "error"])
def test_however_a_run_ends_its_profiler_and_its_logger_are_closed(
    end, tmp_path, tiny_config, gmt_recipe, monkeypatch, caplog
):
    reduce, opened = gmt_recipe._reduce, []

    def interfere(self, *args):
        opened.append(self)
        if self.global_step == 1 and end == "asked to stop":
            self._stop.received = 15
        if self.global_step == 1 and end == "error":
            raise UserError("what has ended the run")
        return reduce(self, *args)

    monkeypatch.setattr(gmt_recipe, "_reduce", interfere)
    cfg = OmegaConf.create(tiny_config(tmp_path, profiler=profiler_of(tmp_path)))
    handlers = [signal.getsignal(number) for number in SIGNALS]
    raised = {"complete": None, "asked to stop": StopRun, "error": UserError}[end]
    try:
        if raised is None:
            gmt_recipe(cfg).run(cfg)
        else:
            with pytest.raises(raised, match="Stopped after step 2" if raised is StopRun else "what has ended"):
                gmt_recipe(cfg).run(cfg)
    finally:
        handlers_after = [signal.getsignal(number) for number in SIGNALS]
        torch.distributed.destroy_process_group()
    assert opened[0]._metric_logger._file.closed
    assert handlers == handlers_after, "the signals were not given back"
    assert list((tmp_path / "traces").rglob("*.json.gz"))  # a trace of the steps so far, written when it was stopped


def test_a_rank_that_fails_does_not_wait_for_the_others_in_the_profiler(gmt_recipe, caplog):
    waits = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        pass  # the first one of a process prepares itself
    for has_failed, wanted in ((True, []), (False, ["all ranks"])):
        profiler = RunProfiler(
            torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], on_trace_ready=lambda _: waits.append("all ranks")
            )
        )
        recipe = make_recipe(gmt_recipe, world_size=2, _profiler=profiler)
        profiler.start()
        recipe._close(has_failed)
        assert waits == wanted


def test_what_fails_while_a_run_ends_does_not_hide_why_it_ended(gmt_recipe, caplog):
    def fail():
        raise OSError("No space left on device")

    closed, profiler = [], RunProfiler(SimpleNamespace(start=lambda: None, stop=fail))
    profiler.start()
    logger = SimpleNamespace(close=lambda: closed.append("logger"))
    recipe = make_recipe(gmt_recipe, _profiler=profiler, _metric_logger=logger)
    recipe._close(has_failed=True)
    assert closed == ["logger"] and "No space left on device" in caplog.text


def test_a_disk_that_fills_between_two_checkpoints_costs_numbers_and_not_the_run(
    tmp_path, tiny_config, run_recipe, gmt_recipe, final_weights, monkeypatch, caplog, capfd
):
    run_recipe(tiny_config(tmp_path / "wanted"))
    log_step = gmt_recipe._log_step

    def on_a_full_disk(self, *args, **kwargs):
        if self.global_step == 2:
            self._metric_logger._logger._file = open("/dev/full", "w")  # noqa: SIM115
        return log_step(self, *args, **kwargs)

    monkeypatch.setattr(gmt_recipe, "_log_step", on_a_full_disk)
    caplog.set_level(logging.WARNING)
    run_recipe(tiny_config(tmp_path / "found"))
    assert caplog.text.count("metric_logger cannot write ([Errno 28] No space left on device): training goes on") == 1
    wanted, found = (final_weights(tmp_path / name) for name in ("wanted", "found"))
    assert wanted and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_going_on_with_more_epochs_says_how_the_learning_rate_changes(
    tmp_path, tiny_config, run_recipe, logged_metrics, caplog
):
    run_recipe(tiny_config(tmp_path, epochs=2, keep_last_n_checkpoints=None))
    shutil.rmtree(tmp_path / "epoch_1")
    before = [step["lr"] for step in logged_metrics(tmp_path)]
    (tmp_path / "logs" / "log.txt").unlink()
    caplog.set_level(logging.INFO)
    run_recipe(tiny_config(tmp_path, epochs=4, keep_last_n_checkpoints=None, resume_from_checkpoint=True))
    after = [step["lr"] for step in logged_metrics(tmp_path)]
    assert len(before) == 8 and len(after) == 12 and after[0] > before[4]
    # What is logged with a step is the rate of the next one
    seam = f"it is {before[3]:.4g} at step 5 and {after[0]:.4g} at the one after"
    said = [record.message for record in caplog.records if "lr_scheduler spreads" in record.message]
    assert said == [
        "lr_scheduler spreads the learning rate over 16 steps (epochs is 4), and did over 8 (epochs was 2): "
        f"{seam}. To keep the old course, set epochs as it was."
    ]


@pytest.mark.parametrize(("error", "is_shown"), [(UserError, False), (UserErrorOfOneRank, True)])
def test_what_one_rank_alone_has_met_is_shown_by_it(error, is_shown, tiny_config, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("GMT_TUNE_SINGLE_PROCESS", raising=False)  # of a test before

    def fail(cfg):
        raise error("row 5 of dataset: answer is null")

    assert entry.run_recipe(OmegaConf.create(tiny_config(tmp_path)), fail) == 1
    assert ("row 5 of dataset: answer is null" in capsys.readouterr().err) == is_shown


def test_the_traceback_of_a_row_is_kept_in_a_file(tiny_config, tmp_path, capsys):
    def fail(cfg):
        raise UserErrorOfOneRank("row 5 of dataset: KeyError: 'answer'") from KeyError("answer")

    assert entry.run_recipe(OmegaConf.create(tiny_config(tmp_path)), fail) == 1
    file = tmp_path / "error_of_rank0.txt"
    assert f"'answer' (its traceback is in {file})" in capsys.readouterr().err and "KeyError" in file.read_text()


def test_a_line_of_progress_that_does_not_fit_on_the_disk_is_left_out(monkeypatch):
    from gmt_tune.integrations.torchtune.run.progress import Progress

    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    monkeypatch.setattr("sys.stdout", full)
    progress = Progress(epoch=1, total=2, done=0, every=1, is_shown=True)
    progress.update(1, 1.0, 1.0, None)
    progress.show_validation(1.0)
    monkeypatch.undo()
    with pytest.raises(OSError):
        full.close()
