"""Runs that are killed, asked to stop, run out of disk, or meet numbers that are not finite."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from forked_run import BREAK, DIE_IN_SAVE, KILL, ForkedRun

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint.run_checkpoints import RunCheckpoints
from gmt_tune.integrations.torchtune.checkpoint.space import space_needed

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "refresh_every": 3, "dense": []}
TORCHRUN = [str(Path(sys.executable).parent / "tune"), "run", "--nproc_per_node", "2", "gmt_full_finetune", "--config"]


def write_config(folder: Path, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def saved_steps(output_dir: Path) -> int:
    """The step of the newest checkpoint with a final name."""
    steps = [0]
    for manifest in output_dir.glob("*/training_progress.json"):
        if not manifest.parent.name.startswith("."):
            try:
                steps.append(json.loads(manifest.read_text())["progress"]["global_step"])
            except FileNotFoundError:  # the run has discarded it meanwhile
                pass
    return max(steps)


def wait_until(condition, run, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert run.is_running(), f"the run ended too early:\n{run.log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, run.log.read_text()[-3000:]
        time.sleep(0.001)


# Quantized states, in turns, with micro-batches; as many rows in a step as without them
COMPACT = dict(
    gradient_mask={**MASK, "density": 0.6, "dense": ["*norm*"]},
    optimizer={"_component_": "gmt_tune.CompactAdamW", "lr": 1e-3, "state_bits": 8},
    batch_size=1,
    gradient_accumulation_steps=2,
    clip_grad_norm=1.0,
)


def kill_until_done(
    tmp_path, tiny_config, final_weights, moments: list[tuple[int, int]], *, processes: int, **more
) -> None:
    """Kill one run again and again, and compare its end with that of a run that nobody killed.

    Args:
        moments: of each life, the rank that is killed, and before which of its changes to the run's folder.
        more: of the config.
    """
    last = 1 + 4 * len(moments) // (32 // processes)  # epoch: a life gets no further than four steps
    changes = dict(
        gradient_mask=MASK, epochs=last + 1, max_steps_per_epoch=None, save_every_n_steps=1, keep_last_n_checkpoints=3,
        resume_from_checkpoint=True, batch_size=2, optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-3},
    ) | more  # fmt: skip
    straight = write_config(tmp_path / "straight", tiny_config(tmp_path / "straight" / "out", **changes))
    undisturbed = ForkedRun(straight, processes=processes)
    killed = write_config(tmp_path / "killed", tiny_config(tmp_path / "killed" / "out", **changes))
    output_dir = tmp_path / "killed" / "out"
    within_saves = 0
    for rank, number in moments:
        run = ForkedRun(killed, processes=processes, environment={KILL: f"{rank} {number} {output_dir}"})
        run.processes[rank].join(120)
        assert run.processes[rank].exitcode == -signal.SIGKILL, run.log.read_text()[-3000:]
        run.kill()
        within_saves += any(output_dir.glob(".incomplete-*_*"))
    assert within_saves >= len(moments) // 4
    assert ForkedRun(killed, processes=processes).wait(600) == [0] * processes
    assert undisturbed.wait(600) == [0] * processes
    assert not any(output_dir.glob(".incomplete-*"))
    # Also where the checkpoint that the last life went on from is long deleted
    names = {path.name for path in (tmp_path / "straight" / "out" / f"epoch_{last}").iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert {path.name for path in (output_dir / f"epoch_{last}").iterdir()} == names
    wanted = final_weights(tmp_path / "straight" / "out", last)
    weights = final_weights(output_dir, last)
    assert wanted.keys() == weights.keys() and len(wanted) > 10
    for key in wanted:
        assert torch.equal(weights[key], wanted[key]), key


# Rank 0 makes about 30 changes until its first save, and about 20 in each; rank 1 writes its part and its mark in each
FEW = {
    1: [(0, number) for number in range(26, 106, 9)],
    2: [*((0, number) for number in range(30, 100, 17)), (1, 12), (1, 14)],
}
ALL = {
    1: [(0, number) for number in range(1, 111)],
    2: [*((0, number) for number in range(1, 111)), *((1, number) for number in range(1, 16))],
}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_many_moments_a_run_ends_with_the_same_weights(processes, tmp_path, tiny_config, final_weights):
    kill_until_done(tmp_path, tiny_config, final_weights, FEW[processes], processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_before_every_change_of_a_file(processes, tmp_path, tiny_config, final_weights):
    kill_until_done(tmp_path, tiny_config, final_weights, ALL[processes], processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_compact_run_that_is_killed_20_times_ends_with_the_same_weights(
    processes, tmp_path, tiny_config, final_weights
):
    moments = random.Random(processes).sample(ALL[processes], 20)
    kill_until_done(tmp_path, tiny_config, final_weights, moments, processes=processes, **COMPACT)


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 1),
        (signal.SIGUSR1, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGUSR1, 1)]
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_asked_to_stop_a_run_saves_says_how_to_go_on_and_does(number, processes, tmp_path, tiny_config, logged_metrics):
    config = tiny_config(tmp_path / "out", gradient_mask=MASK, max_steps_per_epoch=None, epochs=50)
    run = ForkedRun(write_config(tmp_path, config), processes=processes)
    log = tmp_path / "out" / "logs" / "log.txt"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 3, run)
    os.kill(run.processes[-1].pid, number)  # one rank gets it, and all stop
    statuses = run.wait(120)
    assert statuses[-1] == 128 + number and all(status > 128 for status in statuses)
    said = run.log.read_text()
    assert f"{number.name} received" in said and "resume_from_checkpoint=True" in said
    assert "Traceback" not in said
    done = len(log.read_text().splitlines())
    assert saved_steps(tmp_path / "out") == done

    steps = 16 // processes  # of an epoch
    config.update(epochs=done // steps + 1)
    more = ForkedRun(write_config(tmp_path, config), "resume_from_checkpoint=True", processes=processes)
    assert more.wait(240) == [0] * processes
    assert len(logged_metrics(tmp_path / "out")) == config["epochs"] * steps


@pytest.mark.parametrize(
    "is_async, moment",
    [(False, "gathering"), (True, "writing"), pytest.param(False, "writing", marks=pytest.mark.slow)],
)
def test_when_a_rank_dies_in_a_save_the_run_ends_and_the_checkpoint_before_it_resumes(
    is_async, moment, tmp_path, tiny_config, final_weights
):
    changes = dict(gradient_mask=MASK, save_every_n_steps=1, batch_size=2, enable_async_checkpointing=is_async)
    file = write_config(tmp_path / "killed", tiny_config(tmp_path / "killed" / "out", **changes))
    run = ForkedRun(file, processes=2, environment={DIE_IN_SAVE: f"1 step_3 {moment}"})
    assert run.wait(90) == [1, -signal.SIGKILL]
    output_dir, said = tmp_path / "killed" / "out", run.log.read_text()
    assert saved_steps(output_dir) == 2
    if not is_async:  # while training goes on, it may be the next collective that meets with nobody
        assert f"the checkpoint {output_dir / 'step_3'} is not whole: rank 1 ended while it was being written" in said
        assert f"the last whole checkpoint: {output_dir / 'step_2'}" in said
    straight = write_config(tmp_path / "straight", tiny_config(tmp_path / "straight" / "out", **changes))
    assert ForkedRun(straight, processes=2).wait(90) == [0, 0]
    assert ForkedRun(file, "resume_from_checkpoint=True", processes=2).wait(90) == [0, 0]
    resumed, wanted = final_weights(output_dir), final_weights(tmp_path / "straight" / "out")
    assert len(wanted) > 10
    assert all(torch.equal(resumed[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("resumes", [False, True])
def test_a_second_run_in_the_folder_of_one_that_is_running_is_refused(resumes, tmp_path, tiny_config):
    config = tiny_config(tmp_path / "out", gradient_mask=MASK, max_steps_per_epoch=None, epochs=50)
    config.update(save_every_n_steps=3, keep_last_n_checkpoints=2)
    first = ForkedRun(write_config(tmp_path / "first", config))
    wait_until(lambda: saved_steps(tmp_path / "out") >= 3, first)
    second_file = write_config(tmp_path / "second", {**config, "resume_from_checkpoint": resumes})
    second = ForkedRun(second_file)
    assert second.wait(60) == [1]
    assert f"another run is writing here (process {first.processes[0].pid} on " in second.log.read_text()
    assert first.is_running()
    assert not any((tmp_path / "out").glob("previous_*"))
    first.kill()
    overrides = "epochs=1", "max_steps_per_epoch=2", "resume_from_checkpoint=False"
    assert ForkedRun(second_file, *overrides).wait(60) == [0]  # no lock outlives a kill


@pytest.mark.parametrize("is_under_torchrun", [False, True])
def test_a_second_signal_leaves_at_once(is_under_torchrun, tmp_path, tiny_config):
    """But not one that torchrun passes on besides the terminal: both are there when the process looks."""
    config = tiny_config(tmp_path / "out", max_steps_per_epoch=None, epochs=50)
    run = ForkedRun(
        write_config(tmp_path, config), environment={"TORCHELASTIC_RUN_ID": "1"} if is_under_torchrun else {}
    )
    log = tmp_path / "out" / "logs" / "log.txt"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 3, run)
    for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        run.send(number)
    status, said = run.wait(60)[0], run.log.read_text()
    assert said.count(" received: finishing this step") == 1
    assert ("resume_from_checkpoint=True" in said) == is_under_torchrun
    assert (status > 128) if is_under_torchrun else status in (-signal.SIGTERM, -signal.SIGINT)


def test_under_torchrun_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path, tiny_config, final_weights):
    """The command as users type it, ``tune run --nproc_per_node 2``; it is torchrun that gets the signal."""
    changes = dict(gradient_mask=MASK, epochs=8, max_steps_per_epoch=None, resume_from_checkpoint=True, batch_size=2)
    config = tiny_config(tmp_path / "straight" / "out", **changes)
    straight = ForkedRun(write_config(tmp_path / "straight", config), processes=2)
    file = write_config(tmp_path / "stopped", tiny_config(tmp_path / "stopped" / "out", **changes))
    log = tmp_path / "stopped" / "out" / "logs" / "log.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    with open(tmp_path / "said.txt", "w") as said:
        process = subprocess.Popen([*TORCHRUN, str(file)], stdout=said, stderr=said, env=environment, cwd=tmp_path)
        deadline = time.monotonic() + 300
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said.txt").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) != 0
    text = (tmp_path / "said.txt").read_text()
    assert "To go on, run the same command with resume_from_checkpoint=True." in text
    assert "Traceback" not in text and "tune: the run was asked to stop" in text
    assert saved_steps(tmp_path / "stopped" / "out") == len(log.read_text().splitlines())

    assert ForkedRun(file, processes=2).wait(300) == [0, 0]
    assert straight.wait(300) == [0, 0]
    wanted, weights = (final_weights(tmp_path / name / "out", 7) for name in ("straight", "stopped"))
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("on_nonfinite", ["error", "skip"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_met_by_all_alike(
    on_nonfinite, tmp_path, tiny_config, logged_metrics
):
    name = "layers.1.mlp.w2.weight"
    config = tiny_config(tmp_path / "out", gradient_mask=MASK, on_nonfinite=on_nonfinite, save_every_n_steps=1)
    run = ForkedRun(write_config(tmp_path, config), processes=2, environment={BREAK: f"1 3 {name} nan"})
    statuses, said = run.wait(120), run.log.read_text()
    where = f"the gradient of '{name}' holds NaN or infinity at step 3, rows ["
    assert said.count(where) == 1
    rows = json.loads("[" + said.partition(where)[2].partition("]")[0] + "]")
    assert len(set(rows)) == 2 * config["batch_size"]  # of both ranks: the reduction has mixed their gradients
    if on_nonfinite == "error":
        assert statuses == [1, 1] and "Traceback" not in said
        assert f"the last checkpoint: {tmp_path / 'out' / 'step_2'}" in said
    else:
        assert statuses == [0, 0]
        assert [step["skipped_steps"] for step in logged_metrics(tmp_path / "out")] == [0, 0, 1, 1]


@pytest.fixture
def break_gradient(gmt_recipe, monkeypatch):
    """Function that puts a value into one gradient right after the backward pass of one step."""

    def arrange(at_step: int, value: float) -> None:
        reduce = gmt_recipe._reduce

        def breaking(self, *args):
            if self.global_step + 1 == at_step:
                self._model.layers[1].mlp.w2.weight.grad.view(-1)[3] = value
            return reduce(self, *args)

        monkeypatch.setattr(gmt_recipe, "_reduce", breaking)

    return arrange


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_gradient_that_is_not_finite_ends_the_run_before_any_weight_changes(
    value, tmp_path, tiny_config, run_recipe, break_gradient, logged_metrics
):
    break_gradient(at_step=3, value=value)
    with pytest.raises(UserError) as error:
        run_recipe(tiny_config(tmp_path, gradient_mask=MASK, save_every_n_steps=1))
    message = str(error.value)
    assert "the gradient of 'layers.1.mlp.w2.weight'" in message and "at step 3" in message
    assert "rows [" in message and f"the last checkpoint: {tmp_path / 'step_2'}" in message
    assert len(logged_metrics(tmp_path)) == 2


def test_steps_that_are_not_finite_are_left_out_and_counted_on_request(
    tmp_path, tiny_config, run_recipe, break_gradient, logged_metrics
):
    break_gradient(at_step=2, value=float("nan"))
    recipe = run_recipe(tiny_config(tmp_path, gradient_mask=MASK, on_nonfinite="skip"))
    steps = logged_metrics(tmp_path)
    assert [step["skipped_steps"] for step in steps] == [0, 1, 1, 1]
    assert recipe._mask.step == 3
    assert all(torch.isfinite(p).all() for p in recipe._model.parameters())


def test_with_the_optimizer_in_backward_a_gradient_that_is_not_finite_is_not_saved(
    tmp_path, tiny_config, run_recipe, gmt_recipe, monkeypatch
):
    begin = gmt_recipe._begin_training

    def breaking(self):
        def not_finite(grad):
            return grad * float("nan") if self.global_step == 2 else grad

        self._model.layers[1].mlp.w2.weight.register_hook(not_finite)
        return begin(self)

    monkeypatch.setattr(gmt_recipe, "_begin_training", breaking)
    for mask in (MASK, None):
        with pytest.raises(UserError) as error:
            run_recipe(tiny_config(tmp_path, gradient_mask=mask, save_every_n_steps=1, optimizer_in_bwd=True))
        message = str(error.value)
        assert "the gradient of 'layers.1.mlp.w2.weight'" in message and "at step 3, rows [" in message
        assert "weights have changed by it, and are not saved" in message
        assert saved_steps(tmp_path) == 2 and "on_nonfinite" not in message


@pytest.mark.parametrize("is_async", [False, True])
def test_a_save_that_fails_midway_ends_the_run_and_the_checkpoint_before_it_resumes(
    is_async, tmp_path, tiny_config, run_recipe, final_weights, monkeypatch
):
    """A limit on the size of files, which the weights fit into and the training state does not."""
    changes = dict(gradient_mask=MASK, save_every_n_steps=1, enable_async_checkpointing=is_async)
    save, (_, hard) = RunCheckpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_limit(self, name, parts, position):
        if position.global_step == 3:
            self.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        return save(self, name, parts, position)

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "save", with_limit)
        try:
            with pytest.raises(UserError, match=r"step_3 could not be written .*: free disk space") as error:
                run_recipe(tiny_config(tmp_path / "out", **changes))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert f"the last whole checkpoint: {tmp_path / 'out' / 'step_2'}" in str(error.value)
    assert saved_steps(tmp_path / "out") == 2 and not any((tmp_path / "out").glob(".incomplete-*"))
    run_recipe(tiny_config(tmp_path / "out", resume_from_checkpoint=True, **changes))
    run_recipe(tiny_config(tmp_path / "straight", **changes))
    resumed, straight = final_weights(tmp_path / "out"), final_weights(tmp_path / "straight")
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


@pytest.mark.needs_mount
def test_a_full_disk_ends_the_run_with_one_sentence_and_the_checkpoint_before_it_resumes(
    tmp_path, tiny_config, run_recipe, final_weights, monkeypatch
):
    """A tmpfs that holds two checkpoints and a half."""
    # As if something else had filled the disk after the run's own estimate
    monkeypatch.setattr(RunCheckpoints, "check_space", lambda *args: None)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1900k", "tmpfs", str(small)], check=True)
    try:
        changes = dict(gradient_mask=MASK, save_every_n_steps=1)
        with pytest.raises(UserError, match=r"step_\d could not be written .*: free disk space") as error:
            run_recipe(tiny_config(small / "out", **changes))
        whole = saved_steps(small / "out")
        assert whole >= 1 and f"the last whole checkpoint: {small / 'out' / f'step_{whole}'}" in str(error.value)
        assert not any((small / "out").glob(".incomplete-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        run_recipe(tiny_config(small / "out", resume_from_checkpoint=True, **changes))
        run_recipe(tiny_config(tmp_path / "straight", **changes))
        resumed, straight = final_weights(small / "out"), final_weights(tmp_path / "straight")
        assert all(torch.equal(resumed[key], straight[key]) for key in straight)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_too_little_disk_for_the_checkpoints_to_come_is_said_before_training(
    tmp_path, tiny_config, run_recipe, monkeypatch
):
    import shutil

    free = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)  # a megabyte left
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(
        UserError, match=r"has 0\.00 GiB free, but the checkpoints need about .* keep_last_n_checkpoints"
    ):
        run_recipe(tiny_config(tmp_path / "out", save_every_n_steps=1))
    run_recipe(tiny_config(tmp_path / "few", optimizer={"_component_": "torch.optim.SGD", "lr": 0.1}))


@pytest.mark.parametrize(
    "saves, keep_last_n, there, needed",
    [
        (0, None, 0, 10),  # the last checkpoint holds the weights alone
        (3, None, 0, 3 * 30 + 10),
        (3, None, 60, 3 * 30 + 10),  # what is there is kept
        (3, 1, 0, 2 * 30),  # the second is written before the first is discarded
        (1, 1, 0, 30 + 10),
        (5, 2, 60, 3 * 30 - 60),
    ],
)
def test_the_estimate_of_disk_space_is_the_most_that_is_there_at_once(saves, keep_last_n, there, needed):
    assert space_needed(weights=10, state=20, saves=saves, keep_last_n=keep_last_n, existing=there) == needed


def test_validation_loss_is_that_of_all_rows_and_changes_no_training(
    tmp_path, tiny_world, tiny_config, run_recipe, final_weights, logged_metrics
):
    run_recipe(tiny_config(tmp_path / "without"))
    config = tiny_config(tmp_path / "with", run_val_every_n_steps=2, batch_size_val=3)
    config["dataset_val"] = {**config["dataset"]}
    run_recipe(config)
    without, with_validation = final_weights(tmp_path / "without"), final_weights(tmp_path / "with")
    assert all(torch.equal(with_validation[key], without[key]) for key in without)
    values = [step["val_loss"] for step in logged_metrics(tmp_path / "with") if "val_loss" in step]
    assert len(values) == 2 and values[1] < values[0]

    # The independent answer: Hugging Face's model on the rows one by one, with torchtune's tokens and labels
    from torchtune.datasets import instruct_dataset
    from transformers import AutoModelForCausalLM

    from gmt_tune.models.chatml import ChatMLTokenizer

    tokenizer = ChatMLTokenizer(str(tiny_world / "model" / "tokenizer.json"), max_seq_len=128)
    section = {key: value for key, value in config["dataset"].items() if key != "_component_"}
    rows = instruct_dataset(tokenizer, **section)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "with" / "epoch_0")
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        logits = model(torch.tensor([row["tokens"]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    # torchtune counts the tokens of a batch before it shifts the labels, hence the loose end
    assert values[-1] == pytest.approx(total / count, rel=1e-3)
