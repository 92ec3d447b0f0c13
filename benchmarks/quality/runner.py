"""One run from its settings to its result: data, ``tune run``, evaluation, a line of JSON. What is done is skipped."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import shutil
import statistics
import time
from pathlib import Path

import torch
import yaml

from benchmarks.quality import processes, results
from benchmarks.quality.experiment import Method, Run, Suite
from benchmarks.quality.tasks import SPLITS, digest, no_longer, task, write_split
from gmt_tune.errors import UserError
from gmt_tune.reporting.run_reader import Series, read_run

_VERSIONS = ("torch", "torchtune", "torchao", "transformers")
_NOT_FINITE = "holds NaN or infinity at step"  # what our recipe says when a run diverges


class Runner:
    """Makes results that are missing.

    Args:
        work: folder for data, configs, logs and checkpoints; a run's folder is deleted when its result is written.
        fork: start each run as a fork of this process, which saves the seconds of importing torch. Not with CUDA.
        keep: keep checkpoints and logs.
    """

    def __init__(self, work: Path, *, fork: bool = False, keep: bool = False) -> None:
        self._work, self._fork, self._keep = work.expanduser().absolute(), fork, keep
        self._rows: dict[str, dict] = {}
        if fork:
            processes.preload()

    def choose(self, suite: Suite, method: Method) -> None:
        """All runs that choose a method's learning rate."""
        while method.learning_rate_of == method.name and (runs := results.missing_choosing_runs(suite, method)):
            for run in runs:
                if not self.run(run):  # another process is at it, and goes on
                    return

    def measure(self, suite: Suite, method: Method, seed: int, learning_rate: float | None = None) -> None:
        """A measured run, at the chosen learning rate unless one is given."""
        rate = learning_rate or results.chosen_learning_rate(suite, method)
        if rate is None:
            raise UserError(
                f"no learning rate is chosen yet for {suite.name} {method.learning_rate_of}: run "
                f"`python -m benchmarks.quality run {suite.name} {method.learning_rate_of} --choose`, or give --lr"
            )
        self.run(Run(suite, method, rate, seed, "measure"))

    def run(self, run: Run) -> dict:
        """The result of a run, made now unless it is there."""
        done = results.read_valid(run)
        if done is not None:
            return done
        folder = self._work / run.name / run.key()
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{run.name}: another process is at it", flush=True)
                return {}
            done = results.read_valid(run)  # by another process, between the look above and the lock
            if done is not None:
                return done
            result = self._make(run, folder)
        results.write(run.name, result)
        if not self._keep:
            shutil.rmtree(folder)
        shown = {"failed": result["failed"]} if result["failed"] else result["losses"] | {"acc": result.get("accuracy")}
        print(f"{run.name}: {shown} in {result['seconds_total']:.0f} s", flush=True)
        return result

    def base(self, suite: Suite) -> dict:
        """The model before any training, measured like a run."""
        run = Run(suite, Method("base", "before", "none", {}, None, "base", None), 0.0, 0, "measure")
        result = results.read_valid(run)
        if result is None:
            config = self.config(run, self._work / "unused")
            model = Path(config["checkpointer"]["checkpoint_dir"])
            folder = self._work / run.name / run.key()
            result = self._header(run) | self._evaluate(run, config, model, None, folder)[0]
            results.write(run.name, result)
            print(f"{run.name}: {result['losses']} accuracy {result['accuracy']}", flush=True)
        return result

    def config(self, run: Run, folder: Path) -> dict:
        """The run's config for ``tune run``; its data are written."""
        return run.build_config(self._data(run), folder / "out")

    # ------------------------------------------------------------------ steps of a run

    def _make(self, run: Run, folder: Path) -> dict:
        start = time.perf_counter()
        config = self.config(run, folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        arguments = ["run", run.method.recipe, "--config", str(folder / "config.yaml")]
        usage = processes.tune(arguments, folder / "train.log", fork=self._fork)
        result = self._header(run) | {"failed": None}
        if usage.code:
            log = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
            if _NOT_FINITE not in log:
                raise UserError(f"`tune {' '.join(arguments)}` ended with code {usage.code}:\n{log[-2000:]}")
            result["failed"] = next(line for line in log.splitlines() if _NOT_FINITE in line).strip()[-200:]
        result |= _of_training(read_run(folder / "out"), usage)
        if not result["failed"]:
            checkpoint = folder / "out" / f"epoch_{config['epochs'] - 1}"
            base = Path(config["checkpointer"]["checkpoint_dir"])
            measured, used = self._evaluate(run, config, checkpoint, base, folder)
            result |= measured | {"evaluation_seconds": used.seconds}
            if not all(map(math.isfinite, result["losses"].values())):
                result["failed"] = "the loss of the trained model is not finite"  # not every recipe stops at NaN
        result["seconds_total"] = time.perf_counter() - start
        return result

    def _header(self, run: Run) -> dict:
        versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
        versions["cpu"] = torch.backends.cpu.get_cpu_capability()  # "medium" products are in bf16 with some alone
        return {"key": run.key(), "command": run.command, "settings": run.settings(), "versions": versions}

    def _evaluate(self, run: Run, config: dict, model: Path, base: Path | None, folder: Path):
        suite, data = run.suite, self._data(run)
        is_measured = run.phase == "measure"
        what = task(suite.task)
        exact_match = {
            "data_files": str(data["test"]),
            "extract": what.extract,
            "max_new_tokens": suite.evaluation.get("max_new_tokens", what.max_new_tokens),
            "size": suite.sizes.get("questions"),
            "batch_size": suite.evaluation["batch_size"],
            "show": 3,
        }
        texts = what.texts()
        request = {
            "folder": str(model),
            "base": str(base) if base and is_measured else None,
            "tokenizer": config["tokenizer"],
            "device": config["device"],
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config["dtype"]],
            "batch_size": suite.evaluation["batch_size"],
            "window": suite.evaluation["window"],
            "losses": {split: str(data[split]) for split in SPLITS[1:] if split == "validation" or is_measured},
            "float32_matmul_precision": suite.evaluation.get("float32_matmul_precision", "highest"),
            "exact_match": exact_match if is_measured else None,
            "texts": {name: [text, suite.sizes["texts"]] for name, text in texts.items()} if is_measured else {},
        }
        folder.mkdir(parents=True, exist_ok=True)
        asked, answered = folder / "request.json", folder / "evaluation.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        usage = processes.evaluate(asked, answered, folder / "evaluation.log", fork=self._fork)
        if usage.code:
            log = (folder / "evaluation.log").read_text(encoding="utf-8", errors="replace")
            raise UserError(f"the evaluation of {run.name} ended with code {usage.code}:\n{log[-2000:]}")
        result = json.loads(answered.read_text(encoding="utf-8"))
        if is_measured:
            result["text_digests"] = {name: digest(text) for name, text in texts.items()}
        return result, usage

    def _data(self, run: Run) -> dict[str, Path]:
        suite = run.suite
        if suite.task not in self._rows:
            self._rows[suite.task] = task(suite.task).rows(self._work / "downloads")
        folder, rows = self._work / "data" / suite.task, self._rows[suite.task]
        if suite.longest_row:
            folder = folder.with_name(f"{suite.task}_longest{suite.longest_row}")
            rows = {split: no_longer(rows[split], suite.longest_row) for split in rows}
        sizes = {"train": suite.train_rows, **suite.sizes}
        files = {}
        for split in SPLITS:
            size = sizes.get(split)
            name = f"{split}_seed{run.seed}_{size}" if split == "train" else f"{split}_{size}"
            files[split] = folder / f"{name}.jsonl"
            if not files[split].is_file():
                write_split(files[split], rows[split], seed=run.seed if split == "train" else None, size=size)
        return files


def _of_training(log, usage: processes.Usage) -> dict:
    """Numbers of the training process and of its run log."""
    series = log.series
    times = log.times
    durations = [after - before for before, after in zip(times.values, times.values[1:], strict=False)]
    on_device = series.get("peak_memory_reserved", series.get("peak_memory_active"))
    curve = series.get("val_loss", Series())
    loss = series.get("loss", Series())
    every = max(1, len(loss.steps) // 40)
    return {
        "steps": loss.steps[-1] if loss.steps else 0,
        "train_loss": [[s, v] for s, v in zip(loss.steps, loss.values, strict=True)][every - 1 :: every],
        "validation_loss": [[s, v] for s, v in zip(curve.steps, curve.values, strict=True)],
        "seconds_per_step": statistics.median(durations) if durations else None,
        "mask_seconds": statistics.median(series["mask/seconds"].values) if "mask/seconds" in series else None,
        "mask_density": statistics.mean(series["mask/density"].values) if "mask/density" in series else None,
        "peak_memory_gib": max(on_device.values) if on_device else usage.peak_gib,
        "peak_memory_of": "device" if on_device else "process",
        "train_seconds": usage.seconds,
        "train_cpu_seconds": usage.cpu_seconds,
    }
