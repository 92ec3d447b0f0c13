"""From the JSON lines to ``docs/results/peers.md``. Nothing in it is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.checks import LOSS_TOLERANCE
from benchmarks.peers.methods import METHODS, Method
from benchmarks.peers.runs import SETTING, SUITE, Base, Check, Run, best_rate, missing_rates, validation_losses
from benchmarks.quality import results
from benchmarks.quality.statistics import estimate
from benchmarks.quality.tables import table

PAGE = results.RESULTS / "peers.md"


class Column(NamedTuple):
    """A number of a run: its head, how it is read and shown, and whether less is better."""

    head: str
    get: Callable[[Mapping[str, Any]], float]
    digits: int
    less_is_better: bool = True


def write_table() -> Path:
    """Write the page; returns its file."""
    PAGE.write_text(page(), encoding="utf-8")
    return PAGE


def page() -> str:
    """The page's text, from the results on disk."""
    base = results.read_valid(Base())
    assert base is not None, "run `python -m benchmarks.peers run` first"
    rows = {name: _runs(name) for name in METHODS}
    arguments = SETTING["arguments"]
    seeds = sorted({seed for runs in rows.values() for seed in runs})
    return "\n".join(
        [
            "---\norphan: true\n---\n\n# Peers on the Trainer\n",
            "<!-- Made by `python -m benchmarks.peers table` from docs/results/runs: edit nothing here. -->\n",
            f"SmolLM2-135M-Instruct in fp32 on one CPU thread learns to call film reviews positive or negative: "
            f"{arguments['max_steps']} steps of {arguments['per_device_train_batch_size']} snippets, the same ones in "
            f"the same order for all, by transformers' Trainer with a cosine schedule, without weight decay and "
            f"clipping. Questions and answers have {SETTING['longest_row']} characters at most; the loss is of answers "
            f"alone. **Bold** is the best of a column, among {_count(len(seeds), 'seed')}"
            + (": differences can be chance.\n" if len(seeds) < 3 else ".\n"),
            f"Before training: test loss {base['losses']['test']:.3f}, accuracy {base['accuracies']['test']:.1%}, loss "
            f"on other text {base['texts']['text']:.3f}.\n",
            _main_table(rows, _columns(base)),
            f"Test loss and accuracy are of {SETTING['sizes']['test']} snippets of the test split, in nats a token; an "
            "answer is right if greedy decoding gives it. Other text is the English of Python's `pydoc_data.topics`: "
            f"{SETTING['text_windows']} windows of {SETTING['evaluation']['window']} tokens. Peak memory is the most "
            "resident memory of the process from the loading of the model to the last step, less what was resident "
            "before, when all packages were imported: weights, gradients, activations and states. Optimizer state is "
            "the most that `optimizer.state` held at the end of a step, with GaLore's and APOLLO's projections, BAdam's"
            " fp32 copies of weights and the selections of masks. Seconds of CPU time a step are a median; the machine"
            " had other work, which slowed it down by turns.\n",
            "Accumulation: a tiny Llama, in two micro-batches a step. Two processes: the same, each with half of a "
            "batch, as `torchrun --nproc_per_node 2` starts them, with gloo. Yes means that all losses are within "
            f"{LOSS_TOLERANCE:g} of those with whole batches (in brackets: the largest difference), and that both "
            "processes end with equal weights. DDP reduces gradients behind the point where CompactAdamW takes them "
            "in, and is refused there: FSDP2 serves it.\n",
            "## Learning rates\n",
            "Of each method from a grid in steps of a factor 3, by the validation loss of "
            f"{SETTING['sizes']['validation']} other snippets with seed 0; where the best is at an edge, the next is "
            "tried too.\n",
            _rate_table(),
            "## Commands and versions\n",
            "In an environment of its own: `pip install -c constraints.txt -e '.[transformers]' -r "
            "benchmarks/peers/requirements.txt`. "
            + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in _versions().items())
            + ".\n",
            _command_table(rows),
        ]
    )


def _columns(base: Mapping[str, Any]) -> list[Column]:
    before = base["texts"]["text"]
    return [
        Column("test loss", lambda run: run["losses"]["test"], 4),
        Column("accuracy, %", lambda run: 100 * run["accuracies"]["test"], 1, less_is_better=False),
        Column("rise of loss on other text", lambda run: run["texts"]["text"] - before, 3),
        Column("peak memory, GiB", lambda run: run["peak_memory_bytes"] / 2**30, 2),
        Column("optimizer state, MiB", lambda run: run["state_bytes"] / 2**20, 1),
        Column("s a step", lambda run: run["cpu_seconds_per_step"], 1),
    ]


def _main_table(rows: Mapping[str, dict[int, dict]], columns: list[Column]) -> str:
    numbers = {
        name: [estimate([column.get(run) for run in runs.values()]) for column in columns]
        for name, runs in rows.items()
        if runs
    }
    best = [
        (min if column.less_is_better else max)(found[i].mean for found in numbers.values())
        for i, column in enumerate(columns)
    ] if numbers else []  # fmt: skip
    head = ["method", "learning rate", "seeds", *(column.head for column in columns), "accumulation", "two processes"]
    lines = [head]
    for name, of in METHODS.items():
        if name in numbers:
            cells = [of.title, f"{best_rate(name):g}", str(len(rows[name]))]
            for i, (column, found) in enumerate(zip(columns, numbers[name], strict=True)):
                text = f"{found.mean:.{column.digits}f}"
                text = f"**{text}**" if text == f"{best[i]:.{column.digits}f}" else text
                cells.append(text + (f" ± {found.half_width:.{column.digits}f}" if found.half_width else ""))
        else:
            cells = [of.title, "", "0", _reason(name), *[""] * (len(columns) - 1)]
        lines.append([*cells, _check(name, of, "accumulation"), _check(name, of, "processes")])
    return table(lines, text=(0, -2, -1))


def _reason(name: str) -> str:
    """Why a method has no numbers."""
    failed = [result["failed"] for rate in METHODS[name].start if (result := results.read_valid(Run(name, rate, 0)))]
    return f"does not run on a CPU: {failed[0]}" if failed and failed[0] else "not run yet"


def _check(name: str, of: Method, kind: str) -> str:
    result = results.read_valid(Check(name, kind))
    start = f"{of.processes}: " if kind == "processes" else ""
    if result is None:
        return "not run yet"
    if result["failed"]:
        return f"{start}no: {result['failed']}"
    if not result.get("ranks_equal", True):
        return f"{start}no: the processes end with different weights"
    works = result["loss_difference"] <= LOSS_TOLERANCE
    return f"{start}{'yes' if works else 'no: other losses'} ({result['loss_difference']:.1e})"


def _rate_table() -> str:
    lines = [["method", "validation loss by learning rate", "where the grid begins"]]
    for name, of in METHODS.items():
        tried = {rate: loss for rate, loss in validation_losses(name).items() if math.isfinite(loss)}
        best = best_rate(name)
        cells = [f"{rate:g}: " + (f"**{loss:.4f}**" if rate == best else f"{loss:.4f}") for rate, loss in tried.items()]
        if tried and (missing := missing_rates(name)):
            cells.append(f"not run yet: {', '.join(f'{rate:g}' for rate in missing)}")
        lines.append([of.title, "; ".join(cells), of.source])
    return table(lines, text=(0, 1, 2))


def _command_table(rows: Mapping[str, dict[int, dict]]) -> str:
    lines = [["method", "settings", "command"]]
    for name, of in METHODS.items():
        rate = best_rate(name)
        run = Run(name, rate, min(rows[name])) if rate is not None and rows[name] else None
        command = run.command if run else f"python -m benchmarks.peers run {name}"
        settings = ", ".join(f"{key}={value}" for key, value in of.options.items())
        lines.append([of.title, settings.replace("*", "\\*"), f"`{command}`"])
    return table(lines, text=(0, 1, 2))


def _versions() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for result in results.read_all(SUITE).values():
        for name, version in result.get("versions", {}).items():
            found.setdefault(name, set()).add(version)
    return dict(sorted(found.items()))


def _runs(name: str) -> dict[int, dict]:
    """By seed, the runs at the best rate."""
    rate = best_rate(name)
    if rate is None:
        return {}
    found = {seed: results.read_valid(Run(name, rate, seed)) for seed in range(10)}
    return {seed: run for seed, run in found.items() if run and not run["failed"]}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
