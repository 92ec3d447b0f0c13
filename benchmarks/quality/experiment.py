"""A suite and a method become one run's config: an overlay over a config of ``tune ls``, never a fork of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from gmt_tune.errors import UserError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LORA_RECIPE = "lora_finetune_single_device"

_SUITE_KEYS = {
    "title", "task", "base_config", "lora_model", "train_rows", "longest_row", "sizes", "evaluation", "config",
    "own_optimizer", "seeds", "choose", "methods",
}  # fmt: skip
_METHOD_KEYS = {"title", "recipe", "config", "model", "learning_rate_of", "density"}


@dataclass(frozen=True)
class Method:
    """What a file of ``methods/`` says.

    Attributes:
        name: of the file.
        title: for tables.
        recipe: as ``tune ls`` names it.
        config: sections that take the place of the base config's.
        model: keys of a LoRA model; None for models that are trained in full.
        learning_rate_of: the method whose chosen learning rate is used; its own name if it chooses itself.
        density: fraction of the gradient that stays, for plots; None where there is no such number.
    """

    name: str
    title: str
    recipe: str
    config: Mapping
    model: Mapping | None
    learning_rate_of: str
    density: float | None


@dataclass(frozen=True)
class Suite:
    """What a file of ``suites/`` says: a task, how it is trained and evaluated, which methods and seeds.

    Attributes:
        name: of the file.
        title: for tables and plots.
        task: name of a ``tasks.task``.
        base_config: a config of ``tune ls``.
        lora_model: dotted path of the builder with LoRA.
        train_rows: how many training rows each seed draws; None for all.
        longest_row: rows with more characters, of question and answer together, are left out; None for none.
        sizes: how many rows of ``validation`` and ``test`` there are for the loss, how many of the latter are asked
            as ``questions`` (None: all), and how many windows of each of the ``texts`` are read.
        evaluation: ``batch_size``, ``window`` (tokens), and if need be ``max_new_tokens`` and
            ``float32_matmul_precision``.
        config: keys that are merged into the base config.
        own_optimizer: keys that are merged into the optimizer of a method that brings its own.
        seeds: of the measured runs.
        choose: ``learning_rates``, ``seeds`` and ``config`` of the runs that choose a learning rate by the validation
            split; a single rate is taken without a run. A seed that is among ``seeds`` chooses by measured runs. With
            ``start``, the rates that are tried first: as long as the best of those tried is at their edge, its
            neighbour in ``learning_rates`` is tried too.
        methods: names, in the order in which they are run.
    """

    name: str
    title: str
    task: str
    base_config: str
    lora_model: str
    train_rows: int | None
    longest_row: int | None
    sizes: Mapping
    evaluation: Mapping
    config: Mapping
    own_optimizer: Mapping
    seeds: tuple[int, ...]
    choose: Mapping
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One training run: ``phase`` is "choose" (asks only the validation split) or "measure"."""

    suite: Suite
    method: Method
    learning_rate: float
    seed: int
    phase: str

    @property
    def name(self) -> str:
        """Path of its result below the results folder, without ending."""
        return f"{self.suite.name}/{self.method.name}/{self.phase}_lr{self.learning_rate:g}_seed{self.seed}"

    @property
    def command(self) -> str:
        """The command line that makes it."""
        choosing = " --choose" if self.phase == "choose" else ""
        return (
            f"python -m benchmarks.quality run {self.suite.name} {self.method.name}{choosing} "
            f"--seeds {self.seed} --lr {self.learning_rate:g}"
        )

    def settings(self) -> dict:
        """All that decides the outcome, without paths: a result is valid as long as this stays as it is."""
        suite, method = self.suite, self.method
        config = _merged(suite.config, suite.choose.get("config", {})) if self.phase == "choose" else suite.config
        of_method = dict(method.config)
        if "optimizer" in of_method:
            of_method["optimizer"] = {**of_method["optimizer"], **suite.own_optimizer}
        return {
            "suite": suite.name,
            "task": suite.task,
            "base_config": suite.base_config,
            "train_rows": suite.train_rows,
            **({"longest_row": suite.longest_row} if suite.longest_row else {}),
            "sizes": dict(suite.sizes),
            "evaluation": dict(suite.evaluation),
            "config": json.loads(json.dumps(config)),
            "method": method.name,
            "recipe": method.recipe,
            "method_config": json.loads(json.dumps(of_method)),
            "lora": dict(method.model) if method.model else None,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "phase": self.phase,
        }

    def key(self) -> str:
        """A short hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:12]

    def build_config(self, data: Mapping[str, Path], output_dir: Path) -> dict:
        """The config for ``tune run``.

        Args:
            data: files of the splits ``train`` and ``validation``.
            output_dir: of the run.
        """
        settings, method = self.settings(), self.method
        base = _base_config(self.suite.base_config)
        config = _merged(base, settings["config"])
        if method.model is not None:
            of_base = {key: value for key, value in config["model"].items() if key != "_component_"}
            config["model"] = {"_component_": self.suite.lora_model, **of_base, **method.model}
        config.update(settings["method_config"])
        mask = config.get("gradient_mask")
        if mask is None:
            config.pop("gradient_mask", None)
        else:
            mask["seed"] = self.seed
        config["optimizer"]["lr"] = self.learning_rate
        rows = {
            "_component_": "torchtune.datasets.instruct_dataset",
            "source": "json",
            "split": "train",  # all of a file
            "column_map": {"input": "prompt", "output": "answer"},
            "train_on_input": False,
        }
        packed = bool(config["dataset"].get("packed", False))
        is_ours = method.recipe != LORA_RECIPE
        config.update(
            seed=self.seed,
            dataset={**rows, "data_files": str(data["train"]), "packed": packed},
            dataset_val={**rows, "data_files": str(data["validation"])},
            evaluation=None,  # the harness evaluates the checkpoint: the same way for every recipe
            output_dir=str(output_dir),
            keep_last_n_checkpoints=1,
            resume_from_checkpoint=is_ours,  # goes on where an interrupted run stopped
            log_every_n_steps=1,
            log_peak_memory_stats=config["device"] != "cpu",
        )
        if "SMOLLM2_DIR" in os.environ and self.suite.base_config.startswith("smollm2/"):
            config["checkpointer"]["checkpoint_dir"] = os.environ["SMOLLM2_DIR"]
        for key in ("track_selection_every_n_steps", "write_report"):  # neither is read here, and both take time
            config.pop(key, None)
        config["metric_logger"] = {"_component_": "torchtune.training.metric_logging.DiskLogger"}
        config["metric_logger"]["log_dir"] = str(output_dir / "logs")
        if not is_ours:
            config["loss"] = base["loss"]  # torchtune's recipe does not know ours
            config["metric_logger"] = {
                "_component_": "benchmarks.quality.run_logger.RunLogMetricLogger",
                "output_dir": str(output_dir),
            }
        return _resolved(config)


def load_suite(name: str) -> Suite:
    """A file of ``suites/``.

    Raises:
        UserError: if there is none of that name, or a key is wrong.
    """
    values = _load("suites", name, _SUITE_KEYS)
    return Suite(
        name=name,
        title=values["title"],
        task=values["task"],
        base_config=values["base_config"],
        lora_model=values["lora_model"],
        train_rows=values.get("train_rows"),
        longest_row=values.get("longest_row"),
        sizes=values.get("sizes") or {},
        evaluation=values.get("evaluation") or {},
        config=values.get("config") or {},
        own_optimizer=values.get("own_optimizer") or {},
        seeds=tuple(values["seeds"]),
        choose=values["choose"],
        methods=tuple(values["methods"]),
    )


def load_method(name: str) -> Method:
    """A file of ``methods/``.

    Raises:
        UserError: if there is none of that name, or a key is wrong.
    """
    values = _load("methods", name, _METHOD_KEYS)
    return Method(
        name=name,
        title=values["title"],
        recipe=values["recipe"],
        config=values.get("config") or {},
        model=values.get("model"),
        learning_rate_of=values.get("learning_rate_of") or name,
        density=values.get("density"),
    )


def suite_names() -> list[str]:
    """All suites."""
    return _names("suites")


def method_names() -> list[str]:
    """All methods."""
    return _names("methods")


def _names(kind: str) -> list[str]:
    return sorted(file.stem for file in (HERE / kind).glob("*.yaml"))


def _load(kind: str, name: str, known: set[str]) -> dict:
    file = HERE / kind / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"benchmarks/quality/{kind} has no '{name}': choose from {', '.join(_names(kind))}")
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    odd = sorted(set(values) - known)
    if odd:
        raise UserError(f"{file.name}: '{odd[0]}' is no key of {kind}: they are {', '.join(sorted(known))}")
    return values


def _base_config(name: str) -> dict:
    from omegaconf import OmegaConf

    from gmt_tune.integrations.torchtune.plugin.registry import config_paths

    return OmegaConf.to_container(OmegaConf.load(config_paths()[name]), resolve=False)


def _resolved(config: dict) -> dict:
    from omegaconf import OmegaConf

    from gmt_tune.integrations.torchtune.plugin.assets import register_resolver

    register_resolver()
    return OmegaConf.to_container(OmegaConf.create(config), resolve=True)


def _merged(one: Mapping, other: Mapping) -> dict:
    """Keys of both; sections that both have are merged, unless the second names another component."""
    result = dict(one)
    for key, value in other.items():
        mine = result.get(key)
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            replaces = "_component_" in value and value["_component_"] != mine.get("_component_")
            result[key] = dict(value) if replaces else _merged(mine, value)
        else:
            result[key] = value
    return result
