"""Runs of a recipe as processes of their own that start in a second.

What a run imports takes many seconds to import. Here one server process imports it, and each run is forked from it:
a real process, which can be killed and leaves its exit status, and runs the recipe's file as ``tune run`` does.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

# Variable of the environment that asks for a broken gradient: "rank step parameter value".
BREAK = "TEST_BREAK_GRADIENT"
# The same in an entry that is not selected, before a compact optimizer takes the selected ones.
BREAK_UNSELECTED = "TEST_BREAK_UNSELECTED"

# Variable that lets numbers be read as on a GPU: behind the next step.
READ_LATE = "TEST_READ_LATE"
# Variable that asks for a stop: "rank step", of that rank right before the numbers of that step are summed up.
STOP_AT = "TEST_STOP_AT"

# Variable that asks a rank to die while it writes its part of a checkpoint: "rank name"; or when it gives its part of a
# weight: "rank name gathering".
DIE_IN_SAVE = "TEST_DIE_IN_SAVE"
# Variable that asks for a kill: "rank n folder", of that rank right before its n-th change to what is in a folder.
KILL = "TEST_KILL"
_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(
    [
        "torchtune.training",
        "torchdata.stateful_dataloader",
        "datasets",
        "gmt_tune.integrations.torchtune.run.masked_recipe",
        "gmt_tune.models.chatml",
    ]
)


def _run(arguments: list[str], log: str, folder: str, environment: dict[str, str]) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # which the server keeps from itself
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(folder)
    os.environ.update(environment)
    import torch

    from gmt_tune.integrations.torchtune.plugin.registry import recipe_path

    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # torchao's updates compile for 20 s a shape, in every process
    if BREAK in environment:
        _break_gradient(*environment[BREAK].split())
    if BREAK_UNSELECTED in environment:
        _break_unselected(*environment[BREAK_UNSELECTED].split())
    if READ_LATE in environment:
        _read_late()
    if STOP_AT in environment:
        _stop_at(*environment[STOP_AT].split())
    if DIE_IN_SAVE in environment:
        _die_in_save(*environment[DIE_IN_SAVE].split())
    if KILL in environment:
        _kill_before_change(*environment[KILL].split(maxsplit=2))
    path = str(recipe_path("gmt_full_finetune"))
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _break_gradient(rank: str, step: str, name: str, value: str) -> None:
    """Put a value into one entry of one rank's part of a gradient, after the backward pass of one step."""
    from gmt_tune.integrations.torchtune.run.masked_recipe import MaskedRecipe

    reduce = MaskedRecipe._reduce

    def breaking(self, *args):
        if self.rank == int(rank) and self.global_step + 1 == int(step):
            grad = self._model.get_parameter(name).grad
            grad = grad.to_local() if hasattr(grad, "to_local") else grad
            grad.view(-1)[3] = float(value)
        return reduce(self, *args)

    MaskedRecipe._reduce = breaking


def _break_unselected(rank: str, step: str, name: str, value: str) -> None:
    from gmt_tune.integrations.torchtune.run.masked_recipe import MaskedRecipe

    begin = MaskedRecipe._begin_training

    def beginning(self):
        p = self._model.get_parameter(name)

        def breaking(p):
            if self.rank == int(rank) and self.global_step + 1 == int(step):
                grad = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                unselected = ~self._mask.selection(p).mask().view(-1)
                grad.view(-1)[unselected.nonzero()[0]] = float(value)

        handle = p.register_post_accumulate_grad_hook(breaking)
        p._post_accumulate_grad_hooks.move_to_end(handle.id, last=False)
        return begin(self)

    MaskedRecipe._begin_training = beginning


def _read_late() -> None:
    from gmt_tune.integrations.torchtune.run.recipe_setup import RecipeSetup

    begin = RecipeSetup.__init__

    def beginning(self, cfg):
        begin(self, cfg)
        self._reads_late = True

    RecipeSetup.__init__ = beginning


def _stop_at(rank: str, step: str) -> None:
    from gmt_tune.integrations.torchtune.run.masked_recipe import MaskedRecipe

    reduce = MaskedRecipe._reduce

    def stopping(self, *args):
        if self.rank == int(rank) and self.global_step + 1 == int(step):
            os.kill(os.getpid(), signal.SIGTERM)
            while not self._stop.received:  # a thread notes it
                time.sleep(0.001)
        return reduce(self, *args)

    MaskedRecipe._reduce = stopping


def _die_in_save(rank: str, name: str, moment: str = "writing") -> None:
    """Let one rank be killed when it is about to write its part of one checkpoint, or to give its part of a weight."""
    from torch.distributed.tensor import DTensor

    from gmt_tune.integrations.torchtune.checkpoint.run_checkpoints import RunCheckpoints

    write = RunCheckpoints._write

    def dying(self, folder, its_name, *args):
        if self._rank == int(rank) and its_name == name:
            if moment == "writing":
                os.kill(os.getpid(), signal.SIGKILL)
            DTensor.full_tensor = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        return write(self, folder, its_name, *args)

    RunCheckpoints._write = dying


def _kill_before_change(rank: str, number: str, folder: str) -> None:
    """Kill this process, if it is that rank, when it is about to change the folder for the n-th time."""
    left = int(number)

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        if event not in _CHANGES or event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        is_relative = event != "open" and arguments[-1] != -1  # to a folder that is being removed
        if is_relative or str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.get("RANK", "0") == rank:
        sys.addaudithook(count)


class ForkedRun:
    """One run of ``gmt_full_finetune``, on one process or several.

    Args:
        config_file: its config; what the run prints is appended to the file of that name that ends in ``.log``.
        overrides: as on the command line.
        processes: how many ranks.
        environment: added to that of each rank.
    """

    def __init__(self, config_file: Path, *overrides: str, processes: int = 1, environment: dict | None = None) -> None:
        self.log = config_file.with_suffix(".log")
        arguments = ["--config", str(config_file), *overrides]
        common = {"HF_DATASETS_OFFLINE": "1", **(environment or {})}
        ranks = [common]
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
            ranks = [
                {**common, **meet, "WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                for rank in range(processes)
            ]
        self.processes = [
            _FORKSERVER.Process(target=_run, args=(arguments, str(self.log), str(config_file.parent), variables))
            for variables in ranks
        ]
        for process in self.processes:
            process.start()

    def is_running(self) -> bool:
        """Whether no rank has ended."""
        return all(process.exitcode is None for process in self.processes)

    def send(self, number: int) -> None:
        """Send a signal to every rank."""
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        """End all ranks without asking, as when a node goes away."""
        for process in self.processes:
            process.kill()
        self.wait(30)

    def wait(self, timeout: float) -> list[int]:
        """The exit statuses of all ranks."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        if None in statuses:
            for process in self.processes:
                process.kill()
            raise TimeoutError(f"no end after {timeout} s:\n{self.log.read_text()[-3000:]}")
        return statuses
