"""Whole training steps with CompactAdamW and with optimizers of dense states: seconds, and the peak of the process.

    python benchmarks/compact_training.py

The model is SmolLM2-135M in bf16 with random weights; a step is two micro-batches of one sequence of random tokens,
with clipping, and with ``LinearCrossEntropyLoss`` for all methods. Every method trains in a process of its own. They
take their steps in turn, so that a busy machine slows all of them, and the first process reads from outside what
another one's memory was at most (``VmHWM`` of ``/proc``: it needs Linux): weights, gradients, states, activations,
Python and its libraries, the compiler of torchao's optimizers among them. All processes are there at once, about 2 GB
each: ``--method`` takes fewer.

Before anything is timed, compact methods take as many steps as give each tensor its turn, and the others two. On two
idle cores all of it takes some five minutes; on busy ones far more, since a step's threads wait for one another.
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from selection import DTYPES, RESULTS, environment, save
from torch import Tensor, nn
from torchtune.config._utils import _get_component_from_path

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.models.losses import LinearCrossEntropyLoss

CLIP = 1.0


class Method(NamedTuple):
    """``optimizer``: of METHODS. ``density``: of its mask; None for none. ``state_bits``: of compact states."""

    optimizer: str
    density: float | None
    state_bits: int = 32


METHODS = {
    "torch AdamW, fused": Method("AdamW", None),
    "torch AdamW, fused, mask 0.2": Method("AdamW", 0.2),
    "torch AdamW, fused, mask 0.05": Method("AdamW", 0.05),
    "torchao AdamW8bit, mask 0.05": Method("AdamW8bit", 0.05),
    "CompactAdamW, 32 bits, density 0.05": Method("CompactAdamW", 0.05, 32),
    "CompactAdamW, 8 bits, density 0.05": Method("CompactAdamW", 0.05, 8),
}
BESIDE = "torch AdamW, fused"  # what the others' times are divided by


class Settings(NamedTuple):
    """What all methods share."""

    model: str
    dtype: str
    seq_len: int
    accumulation: int
    refresh_every: int
    threads: int


class Training:
    """A model, its optimizer and, with a density, its mask."""

    def __init__(self, method: Method, settings: Settings) -> None:
        torch.manual_seed(0)
        self.settings = settings
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[settings.dtype])
        try:
            self.model: nn.Module = _get_component_from_path(settings.model)(max_seq_len=settings.seq_len)
        finally:
            torch.set_default_dtype(default)
        for p in self.model.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        self.loss = LinearCrossEntropyLoss()
        self.loss.attach_(self.model)
        self.is_compact = method.optimizer == "CompactAdamW"
        self.optimizer = self._make_optimizer(method)
        if method.density is not None:
            refresh_every = settings.refresh_every if self.is_compact else 1
            mask = GradientMask(
                self.model.named_parameters(), method.density, refresh_every=refresh_every, dense=["*norm*", "*.scale"]
            )
            mask.register(self.optimizer)

    def _make_optimizer(self, method: Method) -> torch.optim.Optimizer:
        parameters = self.model.parameters()
        if self.is_compact:
            return CompactAdamW(parameters, lr=2e-5, state_bits=method.state_bits, max_grad_norm=CLIP)
        if method.optimizer == "AdamW8bit":
            from torchao.optim import AdamW8bit

            return AdamW8bit(parameters, lr=2e-5)
        return torch.optim.AdamW(parameters, lr=2e-5, fused=True)

    def step(self) -> float:
        """One optimizer step; returns its seconds."""
        vocab_size = self.model.tok_embeddings.num_embeddings
        tokens_ABS = torch.randint(vocab_size, (self.settings.accumulation, 1, self.settings.seq_len + 1))
        start = time.perf_counter()
        for tokens_BS in tokens_ABS:
            (self._loss(tokens_BS[:, :-1], tokens_BS[:, 1:]) / self.settings.accumulation).backward()
        if not self.is_compact:  # which clips what it applies, in its step
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def _loss(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        with self.loss.of(labels_BS):
            return self.model(tokens_BS)


def _train(method: Method, settings: Settings, connection: Connection) -> None:
    """A process of its own: makes a Training, and takes a step whenever it is asked for one."""
    torch.set_num_threads(settings.threads)
    training = Training(method, settings)
    connection.send(None)
    while connection.recv():
        connection.send(training.step())


def resident_bytes(pid: int, field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its highest value) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def measure(methods: list[str], settings: Settings, rounds: int) -> list[dict]:
    """One row of results for each method."""
    context = multiprocessing.get_context("spawn")
    processes: dict[str, tuple] = {}
    try:
        for name in methods:
            ours, theirs = context.Pipe()
            process = context.Process(target=_train, args=(METHODS[name], settings, theirs), daemon=True)
            process.start()
            theirs.close()  # so that waiting for a process that has died ends
            processes[name] = process, ours
        for _, connection in processes.values():
            connection.recv()

        def step(name: str) -> float:
            _, connection = processes[name]
            connection.send(True)
            return connection.recv()

        before = {name: resident_bytes(process.pid, "VmRSS") for name, (process, _) in processes.items()}
        for name in methods:
            for _ in range(settings.refresh_every if METHODS[name].optimizer == "CompactAdamW" else 2):
                step(name)
        times = {name: [] for name in methods}
        for _ in range(rounds):
            for name in methods:
                times[name].append(step(name))
        peaks = {name: resident_bytes(process.pid, "VmHWM") for name, (process, _) in processes.items()}
        for _, connection in processes.values():
            connection.send(False)
        for process, _ in processes.values():
            process.join()
    finally:
        for process, _ in processes.values():
            process.kill()
    rows = []
    for name in methods:
        ratios = [own / other for own, other in zip(times[name], times.get(BESIDE, []), strict=False)]
        rows.append(
            dict(
                method=name,
                median_s=statistics.median(times[name]),
                mean_s=statistics.mean(times[name]),
                ratio=statistics.median(ratios) if ratios else None,
                peak_bytes=peaks[name],
                before_bytes=before[name],
                times_s=times[name],
            )
        )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        f"| method | step, s (median) | mean | times `{BESIDE}` | peak memory, MiB | with the model alone, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else ""
        memory = " | ".join(f"{row[key] / 2**20:.0f}" for key in ("peak_bytes", "before_bytes"))
        lines.append(f"| {row['method']} | {row['median_s']:.2f} | {row['mean_s']:.2f} | {ratio} | {memory} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(METHODS), action="append", help="one or several; default: all")
    parser.add_argument("--model", default="gmt_tune.models.smollm2.smollm2_135m", help="dotted path of a builder")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--refresh-every", type=int, default=10, help="of compact methods; masks refresh at every step")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each method that are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--json", type=Path, default=RESULTS / "compact_training_cpu.json", help="where to write")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")
    methods = [method for method in METHODS if method in (args.method or METHODS)]
    settings = Settings(args.model, args.dtype, args.seq_len, args.accumulation, args.refresh_every, args.threads)
    print(f"measuring {len(methods)} methods side by side", file=sys.stderr)
    rows = measure(methods, settings, args.rounds)
    print(table(rows))
    save(args.json, {"environment": environment(torch.device("cpu")), **settings._asdict(), "rows": rows})


if __name__ == "__main__":
    main()
