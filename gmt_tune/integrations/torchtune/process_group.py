"""Lets torchtune's distributed recipe run as one plain process and on the CPU, and end with the right exit status.

``tune run RECIPE`` without torchrun options starts the recipe without torchrun's environment variables, and two of
torchtune's memory functions raise where there is no accelerator.
"""

import contextlib
import faulthandler
import os
import select
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torchtune import training

_SINGLE_PROCESS = "GMT_TUNE_SINGLE_PROCESS"  # id of the process that has set torchrun's variables for itself
_GLOO_S = 10.0  # for gloo's threads to finish
_LEAVE_S = 360.0  # for the end of a process that has failed, more than it waits for a checkpoint to be written


def ensure_rendezvous(device_index: str = "") -> None:
    """Let a process that torchrun did not start be a world of one.

    Sets the variables that ``torch.distributed.init_process_group`` reads, unless they are there. Port 0 takes any free
    port, so that several runs on one machine do not meet. ``device_index``, of the config's ``device: cuda:1``, becomes
    LOCAL_RANK, unless a launcher has set that.
    """
    is_launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not _is_single()
    if not is_launched:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        os.environ.pop("LOCAL_RANK", None)  # of an earlier run of this process, on another device
        os.environ[_SINGLE_PROCESS] = str(os.getpid())
    if device_index:
        os.environ.setdefault("LOCAL_RANK", device_index)


def local_rank() -> str | None:
    """LOCAL_RANK as a launcher has set it; None in a process that was started by itself."""
    return None if _is_single() else os.environ.get("LOCAL_RANK")


def _is_single() -> bool:
    return os.environ.get(_SINGLE_PROCESS) == str(os.getpid())  # child processes inherit the variable


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


@contextlib.contextmanager
def waiting_longer(timeout: timedelta = timedelta(hours=6)) -> Iterator[None]:
    """Let the collectives in here wait longer for a process that is busy with files; all processes enter it.

    NCCL's patience is ten minutes, after which it ends the run: a checkpoint of a large model can take longer to
    write, to flush and to read again.
    """
    group = torch.distributed.distributed_c10d._get_default_group()
    backends = {group._get_backend(torch.device(kind)) for kind in {device.type for device in group._device_types}}
    before = {b: b.options._timeout for b in backends if hasattr(b, "options") and hasattr(b, "_set_default_timeout")}
    for backend in before:
        backend._set_default_timeout(timeout)
    try:
        yield
    finally:
        for backend, own_timeout in before.items():
            backend._set_default_timeout(own_timeout)


def watch_ranks_here() -> Callable[[], list[int]]:
    """A function that says which other processes of the run on this machine have ended; all ranks call this together.

    It finds none where the system cannot watch processes, as Linux does by a file descriptor for each.
    """
    here = _machine()
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (here, os.getpid()))
    ranks: dict[int, int] = {}  # by file descriptor
    for rank, (machine, pid) in enumerate(found):
        if here is not None and machine == here and pid != os.getpid():
            with contextlib.suppress(OSError, AttributeError):
                ranks[os.pidfd_open(pid)] = rank
    if not ranks:
        return lambda: []
    ends = select.poll()
    for descriptor in ranks:
        ends.register(descriptor, select.POLLIN)
    return lambda: sorted(ranks[descriptor] for descriptor, _ in ends.poll(0))


def _machine() -> str | None:
    """Differs between two processes that cannot see each other's process ids. None where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def leave(*, has_failed: bool = False) -> None:
    """Destroy the process group, if there is one, and wait until gloo's threads have nothing left to do.

    A thread of gloo frees the tensors of a collective after those who wait for it have gone on, and takes the GIL to do
    so. Once the interpreter is being finalized, Python before 3.14 ends that thread, and C++ calls that a reason to
    abort: a complete run ends with SIGABRT. Destroying the group joins its threads only if nothing else holds it, and
    DTensor's caches do.

    A process that has failed leaves alone, and a group of several stays: NCCL's would wait for the others to finish
    what they have begun together, and they wait for this one.
    """
    if torch.distributed.is_initialized():
        if has_failed and torch.distributed.get_world_size() > 1:
            # Whatever still waits for another process by then waits in vain
            faulthandler.dump_traceback_later(_LEAVE_S, exit=True, file=2)
        else:
            torch.distributed.destroy_process_group()
    deadline = time.monotonic() + _GLOO_S
    before, now = None, _gloo_threads()
    # One that waits for the GIL asks again every few milliseconds, one that waits for work sleeps
    while now and time.monotonic() < deadline and (now != before or any("R" in state for state, *_ in now.values())):
        time.sleep(0.02)  # without the GIL
        before, now = now, _gloo_threads()


def _gloo_threads() -> dict[str, list[str]]:
    """For each thread of gloo, its state (R runs) and how often it was switched: lines of proc(5)'s status."""
    threads = {}
    for status in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread has ended
            name, *lines = status.read_text().splitlines()
            if name.split() == ["Name:", "pt_gloo_runloop"]:
                threads[status.parent.name] = [line for line in lines if "State:" in line or "ctxt_switches:" in line]
    return threads
