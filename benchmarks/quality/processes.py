"""Runs ``tune run`` and the evaluation in processes of their own, and says what each took."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality.experiment import ROOT


class Usage(NamedTuple):
    """What a process took: exit code, wall-clock seconds, seconds of CPU time, peak resident memory in GiB."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_gib: float


def tune(arguments: list[str], log: Path, *, fork: bool) -> Usage:
    """``tune ARGUMENTS``; its output goes to ``log``."""
    return _run(_tune_main, [str(Path(sys.executable).parent / "tune"), *arguments], log, fork)


def evaluate(request: Path, result: Path, log: Path, *, fork: bool) -> Usage:
    """``benchmarks.quality.evaluation.main`` in another process."""
    command = [sys.executable, "-m", "benchmarks.quality.evaluation", str(request), str(result)]
    return _run(_evaluation_main, command, log, fork)


def preload() -> None:
    """Import once what every run needs. Children made by fork then start within a tenth of a second."""
    import datasets  # noqa: F401
    import torch
    import torchtune._cli.tune  # noqa: F401
    import transformers  # noqa: F401

    from benchmarks.quality import evaluation  # noqa: F401
    from gmt_tune.integrations.torchtune.run.base_recipes import load_base_recipe

    load_base_recipe("full_finetune_distributed")
    load_base_recipe("lora_finetune_single_device")
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA is in use in this process and cannot be in a forked one: leave --fork out")


def _run(main, command: list[str], log: Path, fork: bool) -> Usage:
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(log, "ab") as output:
        pid = _forked(main, command, output.fileno()) if fork else _spawned(command, output.fileno())
    try:
        _, status, usage = os.wait4(pid, 0)
    except BaseException:
        os.kill(pid, 15)
        os.wait4(pid, 0)
        raise
    return Usage(
        os.waitstatus_to_exitcode(status),
        time.perf_counter() - start,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss / 2**20,
    )


def _spawned(command: list[str], output: int) -> int:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    files = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
    return os.posix_spawn(command[0], command, {**os.environ, "PYTHONPATH": path}, file_actions=files)


def _forked(main, command: list[str], output: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = command
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        code = main(command) or 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not sys.exit: what the parent has registered to do at its end is the parent's


def _tune_main(command: list[str]) -> int | None:
    from torchtune._cli.tune import main

    return main()


def _evaluation_main(command: list[str]) -> None:
    from benchmarks.quality.evaluation import main

    main(*command[-2:])
