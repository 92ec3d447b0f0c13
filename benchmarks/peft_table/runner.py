"""One experiment from its config to its result: ``tune run``, the evaluation, JSON of the comparison's layout."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.peft_table import data as rows
from benchmarks.peft_table import evaluation
from benchmarks.peft_table.experiments import Experiment
from benchmarks.quality import processes
from benchmarks.quality.experiment import ROOT
from gmt_tune.cli.memory import load_config
from gmt_tune.errors import UserError
from gmt_tune.reporting.run_reader import read_run

EVAL_STEPS = 250  # steps of which the comparison reports means
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def result_file(results: Path, experiment: Experiment) -> Path:
    """Where the result of an experiment is."""
    return results / f"{experiment.name.replace('/', '--')}.json"


def config_of(experiment: Experiment, work: Path, overrides: list[str]) -> dict:
    """The config that goes to ``tune run``.

    Args:
        experiment: what to train.
        work: absolute path of the folder for data, configs, logs and checkpoints.
        overrides: ``KEY=VALUE``, as in ``tune run``.

    Raises:
        UserError: if a key is wrong, or there is no such model, or no GPU for a config that wants one.
    """
    from omegaconf import OmegaConf

    own = [f"output_dir={work / experiment.name / 'out'}", f"dataset.data_files={work / 'data' / 'train.jsonl'}"]
    own.append(f"optimizer.lr={experiment.learning_rate}")
    config = OmegaConf.to_container(load_config(str(experiment.config), [*overrides, *own])[0])
    if config["device"].startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{experiment.method} trains on device {config['device']}, and PyTorch sees no GPU: run it where one of 48 "
            "GB is, or rehearse it with device=cpu and a small model"
        )
    model = Path(config["checkpointer"]["checkpoint_dir"])
    if not (model / "config.json").is_file():
        raise UserError(
            f"there is no model in checkpointer.checkpoint_dir {model}: the first lines of {experiment.config} say how "
            "to download it"
        )
    return config


def run(experiment: Experiment, config: dict, *, results: Path, local: Path | None) -> Path:
    """Make the result of an experiment.

    Args:
        experiment: what to train.
        config: of ``config_of``. The checkpoint is deleted when it has been measured.
        results: folder for the result.
        local: folder with the data (``data.prepare``); None for the hub.

    Returns:
        The file of the result.

    Raises:
        UserError: if there are too few rows, or a process fails.
    """
    from omegaconf import OmegaConf
    from torchtune import config as components

    start, created_at = time.perf_counter(), datetime.now(timezone.utc).replace(microsecond=0).isoformat()
    folder, data_folder = Path(config["output_dir"]).parent, Path(config["dataset"]["data_files"]).parent
    tokenizer = components.instantiate(OmegaConf.create(config["tokenizer"]))
    steps, batch_size = config["max_steps_per_epoch"], config["batch_size"]
    data = rows.prepare(data_folder, tokenizer, local=local, steps=steps, batch_size=batch_size)

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    arguments = ["run", "gmt_full_finetune", "--config", str(folder / "config.yaml")]
    usage = processes.tune(arguments, folder / "train.log", fork=False)
    if usage.code:
        raise UserError(f"`tune {' '.join(arguments)}` ended with code {usage.code}:\n{_end_of(folder / 'train.log')}")
    measured = _evaluate(config, data, folder)
    training = _of_training(folder / "out", data.lengths, batch_size)
    last = training["metrics"][-1]
    last["valid accuracy"] = measured["valid accuracy"]
    training["metrics"].append(
        {
            "step": last["step"],
            "test accuracy": measured["test accuracy"],
            "train loss": last["train loss"],
            "train samples": last["train samples"],
            "train total tokens": sum(data.lengths),
            "forgetting": measured["forgetting"],
        }
    )
    result = {
        "run_info": {
            "created_at": created_at,
            "total_time": time.perf_counter() - start,
            "experiment_name": experiment.name,
            "peft_branch": None,
            "train_config": _train_config(config),
            "peft_config": _peft_config(experiment, config),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": training["reserved_avg"],
            "accelerator_memory_max": max(training["reserved_max"], measured["memory"]),
            "accelerator_memory_reserved_99th": training["reserved_99th"],
            "train_time": training["seconds"] + measured["seconds"],
            "file_size": measured["num_total_params"] * measured["bytes of a parameter"],
            "num_trainable_params": measured["num_total_params"],
            "num_total_params": measured["num_total_params"],
            "status": "success",
            "metrics": training["metrics"],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": data.versions,
            "package_info": _packages(),
            "system_info": _system(),
            "pytorch_info": torch.__config__.show(),
        },
        "gmt_tune": {  # what the comparison has no place for
            "version": importlib.metadata.version("gmt-tune"),
            "config": config,
            "test accuracy, greedy": measured["test accuracy, greedy"],
            **measured["change"],
        },
    }
    file = result_file(results, experiment)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")  # a file that is there is whole: it is not made again
    part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    part.replace(file)
    shutil.rmtree(folder)
    return file


def _evaluate(config: dict, data: rows.Data, folder: Path) -> dict:
    request = {
        "folder": str(folder / "out" / "epoch_0"),
        "base": config["checkpointer"]["checkpoint_dir"],
        "tokenizer": config["tokenizer"],
        "device": config["device"],
        "dtype": _DTYPES[config["dtype"]],
        "seed": config["seed"],
        "validation": str(data.validation),
        "test": str(data.test),
        "wikipedia": str(data.wikipedia),
    }
    asked, answered, log = folder / "request.json", folder / "evaluation.json", folder / "evaluation.log"
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.peft_table.evaluation", str(asked), str(answered)]
    with open(log, "wb") as output:
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output).returncode
    if code:
        raise UserError(f"the evaluation in {folder} ended with code {code}:\n{_end_of(log)}")
    return json.loads(answered.read_text(encoding="utf-8"))


def _of_training(run_dir: Path, lengths: list[int], batch_size: int) -> dict:
    """Numbers of the run log: every step is in it. Bytes, seconds."""
    log = read_run(run_dir)
    losses, times = log.series["loss"].values, log.times.values
    durations = [after - before for before, after in zip(times, times[1:], strict=False)]
    durations.insert(0, statistics.median(durations) if durations else 0.0)  # the log does not know when it began
    reserved = _bytes(log, "peak_memory_reserved") or [0]
    allocated = _bytes(log, "peak_memory_alloc") or [0]
    metrics = []
    for begin in range(0, len(losses), EVAL_STEPS):
        part = slice(begin, begin + EVAL_STEPS)
        step = begin + len(losses[part])
        seconds = sum(durations[part])
        tokens = sum(lengths[begin * batch_size : step * batch_size])
        metrics.append(
            {
                "step": step,
                "valid accuracy": None,  # the recipe generates nothing on the way
                "train loss": statistics.fmean(losses[part]),
                "train samples": step * batch_size,
                "train time": seconds,
                "eval time": None,
                "tokens / sec": tokens / seconds if seconds else None,
                "mem allocated avg": statistics.fmean(allocated[part] or [0]),
                "mem reserved avg": statistics.fmean(reserved[part] or [0]),
                "elapsed time": sum(durations[:step]),
            }
        )
    return {
        "metrics": metrics,
        "seconds": sum(durations),
        "reserved_avg": int(statistics.fmean(reserved)),
        "reserved_99th": int(np.percentile(reserved, 99)),
        "reserved_max": int(max(reserved)),
    }


def _bytes(log, metric: str) -> list[float]:
    return [gib * 2**30 for gib in log.series[metric].values] if metric in log.series else []


def _train_config(config: dict) -> dict:
    """The comparison's names for what the config says."""
    repository = Path(config["checkpointer"]["checkpoint_dir"]) / "original_repo_id.json"
    optimizer = {key: value for key, value in config["optimizer"].items() if key != "_component_"}
    return {
        "model_id": json.loads(repository.read_text())["repo_id"] if repository.is_file() else repository.parent.name,
        "dtype": _DTYPES[config["dtype"]],
        "max_seq_length": config["tokenizer"]["max_seq_len"],
        "batch_size": config["batch_size"],
        "batch_size_eval": evaluation.QUESTIONS_AT_A_TIME,
        "max_steps": config["max_steps_per_epoch"],
        "eval_steps": EVAL_STEPS,
        "compile": config["compile"],
        "use_gc": config["enable_activation_checkpointing"],
        "query_template": rows.prompt("{query}"),
        "seed": config["seed"],
        "grad_norm_clip": config["clip_grad_norm"],
        "optimizer_type": config["optimizer"]["_component_"].rpartition(".")[2],
        "optimizer_kwargs": optimizer,
        "lr_scheduler": "cosine",
        "use_amp": False,
        "autocast_adapter_dtype": False,
        "generation_kwargs": {"max_new_tokens": evaluation.MAX_NEW_TOKENS},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _peft_config(experiment: Experiment, config: dict) -> dict | None:
    mask = config.get("gradient_mask")
    if mask is None:
        return None
    return {"peft_type": experiment.peft_type} | {key: mask[key] for key in mask if key != "_component_"}


def _packages() -> dict:
    found = {name: None for name in _PACKAGES}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass  # only the comparison needs it
    return {
        f"{name}-{what}": found[name] if what == "version" else None
        for name in found
        for what in ("version", "commit-hash")
    }


def _system() -> dict:
    system = platform.uname()
    return {
        "system": system.system,
        "release": system.release,
        "version": system.version,
        "machine": system.machine,
        "processor": system.processor,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]
