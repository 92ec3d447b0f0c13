"""What lets torchtune's distributed recipe run as one plain process, and on the CPU.

``tune run RECIPE`` without torchrun options starts the recipe without torchrun's environment variables,
and two of torchtune's memory functions raise where there is no accelerator.
"""

import contextlib
import gc
import os
from collections.abc import Iterator

import torch
from torchtune import training


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
