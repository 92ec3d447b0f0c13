"""torchrun in a test, with workers that start in a second.

It is torchrun's own launcher with its agent, rendezvous and environment. Only the worker processes, instead of
importing torch and torchtune for many seconds each, are forked from a server process that has imported them once.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

NEEDS_FSDP2_ON_CPU = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 trains on GPUs alone"
)

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torchtune.training",
    "torchdata.stateful_dataloader",
    "datasets",
    "gmt_tune.integrations.torchtune.run.masked_recipe",
    "gmt_tune.models.chatml",
]
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


def torchrun(script: Path, *arguments: object, processes: int, log_dir: Path) -> None:
    """``torchrun --standalone --nproc_per_node PROCESSES SCRIPT ARGUMENTS``.

    Args:
        script: run as ``__main__`` in each process; it ends itself when it takes too long.
        arguments: given to it.
        processes: how many.
        log_dir: where each process's output goes.

    Raises:
        AssertionError: with the end of their output, if a process fails.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"test-{os.getpid()}-{log_dir.name}",
        start_method="forkserver",
        max_restarts=0,
        monitor_interval=0.05,
    )
    log_dir.mkdir(parents=True, exist_ok=True)
    try:
        elastic_launch(config, _run)(str(script), [str(a) for a in arguments], str(log_dir))
    except Exception as error:
        logs = [f"{file.name}:\n{file.read_text()[-4000:]}" for file in sorted(log_dir.glob("rank*.log"))]
        raise AssertionError("\n\n".join([str(error)[-5000:], *logs])) from None


def _run(script: str, arguments: list[str], log_dir: str) -> None:
    output = os.open(f"{log_dir}/rank{os.environ['RANK']}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    import torch

    torch.set_num_threads(1)  # several processes share few cores
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
        # The launcher waits for this function to return
