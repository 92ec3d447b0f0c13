"""Runs that are killed, told to stop, run out of disk, or meet numbers that are not finite."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoints import RunCheckpoints

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "refresh_every": 3}
RECIPE = [sys.executable, "-m", "gmt_full_finetune", "--config"]


def start(config_file: Path, processes: int = 1) -> subprocess.Popen:
    command = [*RECIPE, str(config_file)]
    if processes > 1:
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
        command = [*torchrun, *command[1:]]
    log = open(config_file.with_suffix(".log"), "a")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    # A session of its own, so that a kill reaches launcher and workers alike, as when a node goes away
    return subprocess.Popen(
        command, stdout=log, stderr=log, env=environment, cwd=config_file.parent, start_new_session=True
    )


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    os.killpg(process.pid, number)
    process.wait()


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
            steps.append(json.loads(manifest.read_text())["progress"]["global_step"])
    return max(steps)


def kill_until_done(tmp_path, tiny_config, final_weights, *, processes: int, kills: int, steps: int) -> None:
    changes = dict(
        gradient_mask=MASK, max_steps_per_epoch=steps, save_every_n_steps=1, keep_last_n_checkpoints=3,
        resume_from_checkpoint=True, batch_size=2, optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-3},
    )  # fmt: skip
    straight = write_config(tmp_path / "straight", tiny_config(tmp_path / "straight" / "out", **changes))
    assert start(straight, processes).wait(timeout=600) == 0, straight.with_suffix(".log").read_text()[-3000:]

    killed = write_config(tmp_path / "killed", tiny_config(tmp_path / "killed" / "out", **changes))
    output_dir = tmp_path / "killed" / "out"
    rng = random.Random(processes)
    seen_incomplete = 0
    for _ in range(kills):
        process = start(killed, processes)
        before = saved_steps(output_dir)
        deadline = time.monotonic() + 240
        # Wait until it trains again, then kill at a random moment: within steps and within saves
        while saved_steps(output_dir) == before and process.poll() is None:
            assert time.monotonic() < deadline, killed.with_suffix(".log").read_text()[-3000:]
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None, "the run ended before it could be killed: it needs more steps"
        kill(process)
        seen_incomplete += any(output_dir.glob(".incomplete-*"))
    assert start(killed, processes).wait(timeout=600) == 0, killed.with_suffix(".log").read_text()[-3000:]
    assert not any(output_dir.glob(".incomplete-*"))
    wanted, weights = final_weights(tmp_path / "straight" / "out"), final_weights(output_dir)
    assert wanted.keys() == weights.keys()
    for key in wanted:
        assert torch.equal(weights[key], wanted[key]), key
    print(f"{kills} kills with {processes} process(es), {seen_incomplete} of them within a save")


@pytest.mark.parametrize("processes, kills", [(1, 18), (2, 7)])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(
    processes, kills, tmp_path, tiny_config, final_weights
):
    kill_until_done(tmp_path, tiny_config, final_weights, processes=processes, kills=kills, steps=kills * 8 // 5 + 3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_a_hundred_times_each(processes, tmp_path, tiny_config, final_weights):
    kill_until_done(tmp_path, tiny_config, final_weights, processes=processes, kills=100, steps=200)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_told_to_stop_a_run_saves_says_how_to_go_on_and_does(number, tmp_path, tiny_config, logged_metrics):
    config = tiny_config(tmp_path / "out", gradient_mask=MASK, max_steps_per_epoch=None, epochs=50)
    file = write_config(tmp_path, config)
    process = start(file)
    log = tmp_path / "out" / "logs" / "log.txt"
    deadline = time.monotonic() + 240
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline and process.poll() is None, file.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    said = file.with_suffix(".log").read_text()
    assert f"{number.name} received" in said and "resume_from_checkpoint=True" in said
    assert "Traceback" not in said
    done = len(log.read_text().splitlines())
    assert saved_steps(tmp_path / "out") == done

    config.update(resume_from_checkpoint=True, epochs=done // 16 + 1)
    process = start(write_config(tmp_path, config))
    assert process.wait(timeout=240) == 0
    assert len(logged_metrics(tmp_path / "out")) == config["epochs"] * 16


def test_a_second_signal_leaves_at_once(tmp_path):
    code = (
        "import os, signal, time\n"
        "from gmt_tune.integrations.torchtune import signals\n"
        "signals.SECONDS_OF_ONE_WISH = 0.2\n"
        "stop = signals.StopSignal(); stop.install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still here', stop.received, flush=True)\n"
        "time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
        "print('must not be reached')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "still here 15" in process.stdout and "must not be reached" not in process.stdout
    assert process.returncode == -signal.SIGTERM


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


def test_a_full_disk_ends_the_run_with_one_sentence_and_the_checkpoint_before_it_resumes(
    tmp_path, tiny_config, run_recipe, final_weights, monkeypatch
):
    """A tmpfs that holds two checkpoints and a half; where none can be mounted, the test says so."""
    # As if something else had filled the disk after the run's own estimate
    monkeypatch.setattr(RunCheckpoints, "check_space", lambda *args: None)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1900k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
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


def test_too_little_disk_for_the_checkpoints_to_come_is_told_before_training(
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
