"""What lets torchtune's distributed recipe run as one plain process, and on the CPU.

``tune run RECIPE`` without torchrun options starts the recipe without torchrun's environment variables,
and two of torchtune's memory functions raise where there is no accelerator. And what lets it end with the exit
status that it has earned.
"""

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torchtune import training

_GLOO_THREAD = "pt_gloo_runloop"
_PATIENCE = 10.0  # seconds
_LOOK_EVERY = 0.01  # seconds


def ensure_rendezvous() -> None:
    """Let a process that torchrun did not start be a world of one.

    Sets the variables that ``torch.distributed.init_process_group`` reads, unless they are there. Port 0
    takes any free port, so that several runs on one machine do not meet. LOCAL_RANK stays unset: the
    config's ``device: cuda:1`` keeps its meaning.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


@contextlib.contextmanager
def no_memory_stats_on_cpu(device: torch.device) -> Iterator[None]:
    """On the CPU, skip the memory report at the end of torchtune's model set-up, which would raise."""
    if device.type != "cpu":
        yield
        return
    get, log = training.get_memory_stats, training.log_memory_stats
    training.get_memory_stats = lambda device, reset_stats=True: {}
    training.log_memory_stats = lambda stats, message="": None
    try:
        yield
    finally:
        training.get_memory_stats, training.log_memory_stats = get, log


def cleanup_before_training(device: torch.device) -> None:
    """Free what set-up left behind, as ``torchtune.training.cleanup_before_training``, on any device."""
    if device.type == "cpu":
        gc.collect()
    else:
        training.cleanup_before_training()


def leave() -> None:
    """Destroy the process group, if there is one, and wait until gloo's threads have nothing left to do.

    A thread of gloo frees the tensors of a collective after those who wait for it have gone on, and takes the GIL
    to do so. If the interpreter is already being finalized by then, Python before 3.14 ends that thread, and C++
    calls that a reason to abort: a run that has done all its work ends with SIGABRT. Destroying the group joins its
    threads only if nothing else holds it, and DTensor's caches do.
    """
    if not torch.distributed.is_initialized():
        return
    torch.distributed.destroy_process_group()
    deadline = time.monotonic() + _PATIENCE
    idle = 0
    while idle < 2 and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY)  # without the GIL: who waits for it gets it, and runs
        idle = 0 if _gloo_is_running() else idle + 1


def _gloo_is_running() -> bool:
    """Whether a thread of gloo is on a core, or waits for one. False where there is no Linux to ask."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            if name == _GLOO_THREAD and rest.split()[0] == "R":
                return True
    return False
