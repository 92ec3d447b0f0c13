"""Runs and their results: what is trained and evaluated, which learning rate is chosen, what is still missing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchtune import config

from benchmarks.peers import training
from benchmarks.peers.methods import LADDER, METHODS, method
from benchmarks.quality import results
from benchmarks.quality.tasks import SPLITS, Row, no_longer, task, write_split
from gmt_tune.errors import UserError

SUITE = "peers"
SETTING: dict[str, Any] = {
    "task": "sentiment",
    "longest_row": 120,  # characters of a question and its answer: rows with more are left out
    "sizes": {"validation": 64, "test": 160},
    "text_windows": 2,
    "evaluation": {"batch_size": 20, "window": 256},
    "arguments": {"max_steps": 40, "per_device_train_batch_size": 6, "warmup_steps": 4},
}
CHECKS = ("accumulation", "processes")
_SHARED_PACKAGES = ("torch", "transformers", "accelerate")
_MODULES = {"peft": "peft", "badam": "badam", "apollo-torch": "apollo_torch", "torchao": "torchao.optim"}
_MODULES |= {"galore-torch": "galore_torch", "flashoptim": "flashoptim"}


@dataclass(frozen=True)
class Run:
    """A training by a method."""

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{SUITE}/{self.method}/lr{self.learning_rate:g}_seed{self.seed}"

    @property
    def command(self) -> str:
        """The command line that makes it."""
        return f"python -m benchmarks.peers run {self.method} --lr {self.learning_rate:g} --seeds {self.seed}"

    def key(self) -> str:
        """A short hash of all that decides the outcome."""
        return _key(SETTING, self.method, METHODS[self.method].options, self.learning_rate, self.seed)


@dataclass(frozen=True)
class Check:
    """A short training of a tiny Llama, compared with another: see ``checks``."""

    method: str
    kind: str

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{SUITE}/{self.method}/{self.kind}"

    @property
    def command(self) -> str:
        """The command line that makes it."""
        return f"python -m benchmarks.peers check {self.method}"

    def key(self) -> str:
        """A short hash of all that decides the outcome."""
        return _key(self.method, METHODS[self.method].options, self.kind)


def _key(*settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def validation_losses(name: str, seed: int = 0) -> dict[float, float]:
    """By learning rate, of the runs of a seed that there are; infinite where a training did not end well."""
    found = {rate: results.read_valid(Run(name, rate, seed)) for rate in LADDER}
    return {rate: loss_of(result, "validation") for rate, result in found.items() if result is not None}


def loss_of(result: Mapping[str, Any], split: str) -> float:
    """A loss, infinite where there is none."""
    loss = None if result["failed"] else result["losses"].get(split)
    return float("inf") if loss is None else loss


def missing_rates(name: str) -> list[float]:
    """Learning rates to try next, as in the other suites; a method that never ended is not tried at more."""
    losses = validation_losses(name)
    if losses and min(losses.values()) == float("inf"):
        return []
    return results.rates_to_try(LADDER, METHODS[name].start, losses)


def best_rate(name: str) -> float | None:
    """The rate with the lowest validation loss of those that were tried; None if there is none."""
    tried = {rate: loss for rate, loss in validation_losses(name).items() if loss < float("inf")}
    return min(tried, key=lambda rate: tried[rate]) if tried else None


class Runner:
    """Makes results that are missing.

    Args:
        model: folder of SmolLM2-135M-Instruct.
        work: folder for data and logs.
    """

    def __init__(self, model: Path, work: Path) -> None:
        self._model, self._work = model, work.expanduser().absolute()
        if not (model / "config.json").is_file():
            raise UserError(
                f"{model} holds no model: run `gmt-tune fetch smollm2-135m {model}`, or let SMOLLM2_DIR name its folder"
            )
        self._tokenizer = {
            "_component_": "gmt_tune.models.smollm2.smollm2_tokenizer",
            "path": str(model / "tokenizer.json"),
            "max_seq_len": 256,
            "system_prompt": None,
        }
        self._rows: dict[str, list[Row]] = {}

    def choose(self, name: str) -> float | None:
        """The chosen learning rate of a method, after the runs that choose it."""
        while rates := missing_rates(name):
            self.train(Run(name, rates[0], 0))
        return best_rate(name)

    def train(self, run: Run) -> None:
        """A training, and what its model then does."""
        if results.read_valid(run) is None:
            packages = method(run.method).packages
            request = {
                "method": run.method,
                "rows": str(self._train_rows(run.seed)),
                "learning_rate": run.learning_rate,
                "seed": run.seed,
                "arguments": SETTING["arguments"],
                "imports": [_MODULES[name] for name in packages],
            }
            made = {"key": run.key(), "command": run.command, "versions": versions((*_SHARED_PACKAGES, *packages))}
            self._write(run, made | self._in_process(request, self._work / run.name))

    def base(self) -> None:
        """The model before any training."""
        run = Base()
        if results.read_valid(run) is None:
            made = {"key": run.key(), "versions": versions(_SHARED_PACKAGES)}
            self._write(run, made | self._in_process(None, self._work / run.name))

    def check(self, check: Check) -> None:
        """A check; see ``checks``."""
        from benchmarks.peers import checks

        if results.read_valid(check) is None:
            packages = (*_SHARED_PACKAGES, *method(check.method).packages)
            result = {"key": check.key(), "command": check.command, "versions": versions(packages)}
            self._write(check, result | checks.run(check.method, check.kind, self._work / check.name))

    def _write(self, run: Run | Check | Base, result: dict[str, Any]) -> None:
        results.write(run.name, result)
        hidden = ("key", "command", "versions", "train_loss")
        print(f"{run.name}: { ({key: value for key, value in result.items() if key not in hidden}) }", flush=True)

    # ------------------------------------------------------------------ data and requests

    def _split(self, split: str) -> list[Row]:
        if not self._rows:
            rows = task(SETTING["task"]).rows(self._work / "downloads")
            self._rows = {name: no_longer(rows[name], SETTING["longest_row"]) for name in SPLITS}
        return self._rows[split]

    def _data(self, split: str) -> Path:
        size = SETTING["sizes"][split]
        file = self._work / "data" / f"{split}_{size}_longest{SETTING['longest_row']}.jsonl"
        if not file.is_file():
            write_split(file, self._split(split), size=size)
        return file

    def _train_rows(self, seed: int) -> Path:
        """Token ids and labels of the rows that a training sees, in their order."""
        arguments = SETTING["arguments"]
        size = arguments["max_steps"] * arguments["per_device_train_batch_size"]
        file = self._work / "data" / f"train_seed{seed}_{size}_longest{SETTING['longest_row']}.jsonl"
        if not file.is_file():
            tokenizer = config.instantiate(OmegaConf.create(self._tokenizer))
            rows = list(self._split("train"))
            random.Random(seed).shuffle(rows)
            lines = [json.dumps(training.encode(tokenizer, *row)) for row in rows[:size]]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    def _in_process(self, train: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
        """A fork of this process trains and evaluates: what it imported need not be imported for each run."""
        request = {
            "model": str(self._model),
            "train": train,
            "evaluation": {
                "tokenizer": self._tokenizer,
                **SETTING["evaluation"],
                "questions": {split: str(self._data(split)) for split in SETTING["sizes"]},
                "texts": {"text": [task(SETTING["task"]).texts()["text"], SETTING["text_windows"]]},
            },
        }
        folder.mkdir(parents=True, exist_ok=True)
        asked, answered, log = folder / "request.json", folder / "result.json", folder / "log.txt"
        asked.write_text(json.dumps(request), encoding="utf-8")
        answered.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(
            target=training.main, args=(str(asked), str(answered), str(log))
        )
        process.start()
        process.join()
        if not answered.is_file():
            raise UserError(f"a run ended with code {process.exitcode} and no result: see {log}")
        return json.loads(answered.read_text(encoding="utf-8"))


class Base:
    """The model before any training, as a run."""

    name = f"{SUITE}/base/untrained"

    def key(self) -> str:
        """A short hash of all that decides the outcome."""
        return _key({name: SETTING[name] for name in ("task", "longest_row", "sizes", "text_windows", "evaluation")})


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions.

    Raises:
        UserError: if a package is not there.
    """
    try:
        return {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: run `pip install -r benchmarks/peers/requirements.txt`"
        ) from None
