"""The README.md of a checkpoint, as the Hugging Face hub shows it: what the model is, and how it was made.

It is written for people who never saw the machine: no secrets, and of a path only its last part. Whoever publishes the
folder may change it; nothing reads it back, and no run minds what is in it.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from omegaconf import ListConfig, OmegaConf
from torchtune.config._utils import _get_component_from_path

from gmt_tune._installed import installed_version
from gmt_tune.integrations.torchtune.checkpoint.manifest import Progress
from gmt_tune.integrations.torchtune.config.reading import PATH_KEY
from gmt_tune.integrations.torchtune.plugin.registry import config_paths
from gmt_tune.models.origin import TAG, Base, is_hub_id, read_json_object
from gmt_tune.reporting.run_log import RUN_LOG_FILE, read_lines
from gmt_tune.reporting.weights_reader import DELTA

_PAPER = "https://arxiv.org/abs/2406.15330"
_HUB = "https://huggingface.co"

_PATH = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|\.{1,2}[/\\]|[\w+.-]+://")
_SECTIONS = ("model", "tokenizer", "loss", "optimizer", "lr_scheduler")
_VALUES = ("epochs", "max_steps_per_epoch", "dtype", "clip_grad_norm", "optimizer_in_bwd", "seed", "shuffle")
# Numbers of a run that say nothing of the model
_OF_THE_RUN = ("mask/", "lr", "grad_norm", "tokens_per_second", "peak_memory", "skipped_steps")
_PACKAGES = (TAG, "torch", "torchtune", "torchao", "transformers")
_LONGEST_CELL = 400  # characters


def model_card(
    folder: Path,
    name: str,
    progress: Progress,
    *,
    base: Base,
    policy: Mapping[str, object] | None,
    parameters: int,
    is_hugging_face: bool,
    run_dir: Path,
) -> str:
    """The text of a checkpoint's README.md.

    Args:
        folder: holds the checkpoint's files.
        name: of the checkpoint, such as ``epoch_0``.
        progress: of the checkpoint; its config is without secrets.
        policy: of the mask, as ``GradientMask.policy`` gives it; None without a mask.
        parameters: of the model, how many.
        is_hugging_face: whether files are laid out as transformers loads them.
        run_dir: has the run log.
    """
    config = _without_folders(progress.config)
    architecture = read_json_object(folder / "config.json") or {}
    is_loadable = is_hugging_face and "model_type" in architecture and "vision_config" not in architecture
    method = "DPO" if "ref_checkpointer" in config else "full fine-tuning"
    data = ModelCardData(
        base_model=base.repo_id,
        library_name="transformers" if is_loadable else None,
        pipeline_tag="text-generation" if is_loadable else None,
        tags=[TAG, *(["gradient-mask-tuning"] if policy else []), "dpo" if method == "DPO" else "sft"],
        datasets=list(dict.fromkeys(filter(None, map(_hub_dataset, _datasets(config))))) or None,
        **(base.license or {"license": "other"}),
    )
    origin = f"[{base.name}]({_HUB}/{base.name})" if base.repo_id else f"`{base.name}`"
    if base.weights is not None:
        origin += f" ({base.weights})"
    mask = f" with a [gradient mask]({_PAPER})" if policy else ""
    steps = progress.steps_per_epoch * progress.total_epochs
    blocks = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base.name.rpartition('/')[2]} after {method}{' with a gradient mask' if policy else ''}",
        f"{origin}, trained further with gmt-tune by {method}{mask}: checkpoint `{name}`, step "
        f"{progress.global_step} of {steps}. The training run wrote this page; its answers have not been reviewed.",
        *(_how_to_load(folder) if is_loadable and progress.model_files else ()),
        *(() if progress.model_files else (_how_to_apply(base),)),
        "## Data",
        _table(("data set", "rows", "what it is"), _data_rows(config, progress)),
        "## Training",
        _table(("setting", "value"), _setting_rows(config, progress, policy, parameters)),
        *_numbers(run_dir / RUN_LOG_FILE, progress.global_step),
        "## Licence",
        _licence(base, folder),
        "## How it was made",
        *_command(config, progress.world_size),
        f"With {_versions()}.",
    ]
    text = "\n\n".join(blocks) + "\n"
    home = str(Path.home())
    as_a_path = rf"(?<![\w./]){re.escape(home)}(?=[/\\\s`'\",)\]]|$)"
    return re.sub(as_a_path, "~", text) if len(home) > 1 else text


def _datasets(config: Mapping) -> list[dict]:
    sections = config.get("dataset")
    return [s for s in (sections if isinstance(sections, list) else [sections]) if isinstance(s, dict)]


def _hub_dataset(section: Mapping) -> str | None:
    """The data set's name on the hub, which many of torchtune's components have by default."""
    source = section.get("source")
    if source is None:
        try:
            parameters = inspect.signature(_get_component_from_path(section["_component_"])).parameters
            source = parameters["source"].default
        except Exception:  # a component of any kind
            return None
    return source if is_hub_id(source) and not section.get("data_files") else None


def _without_folders(value: Any, key: str = "") -> Any:
    """A config in which paths and addresses have only their last part: names of folders and hosts are private.

    A path is what begins as one, or is under a ``key`` that has paths. Prompts stay as they are.
    """
    if "prompt" in key:
        return value
    if isinstance(value, Mapping):
        return {name: _without_folders(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each, key) for each in value]
    is_path = isinstance(value, str) and (
        _PATH.match(value) or (PATH_KEY.fullmatch(key) and not (key == "source" and is_hub_id(value)))
    )
    if not is_path:
        return value
    path = value.partition("?")[0] if "://" in value else value
    is_home = os.path.expanduser(path).rstrip("/") == str(Path.home())
    return "~" if is_home else re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _data_rows(config: Mapping, progress: Progress) -> list[tuple]:
    sections = _datasets(config)
    total = f"{progress.dataset_rows:,}"
    rows = [("`dataset`", total if len(sections) == 1 else f"{total} in all", _component(s)) for s in sections]
    held_out = config.get("dataset_val")
    return [*rows, *([("`dataset_val`, held out", "", _component(held_out))] if isinstance(held_out, dict) else [])]


def _setting_rows(config: Mapping, progress: Progress, policy: Mapping | None, parameters: int) -> list[tuple]:
    rows: list[tuple[str, object]] = [("parameters", f"{parameters:,}")]
    if policy is not None:
        component = config.get("gradient_mask", {}).get("_component_", "")
        rows.append(("`gradient_mask`", _component({"_component_": component, **policy})))
    rows += [(f"`{key}`", _component(config[key])) for key in _SECTIONS if isinstance(config.get(key), dict)]
    accumulation, ranks = config.get("gradient_accumulation_steps"), progress.world_size
    batch = f"{progress.rows_of_a_step} rows: `batch_size` {config.get('batch_size')}"
    batch += f", `gradient_accumulation_steps` {accumulation}"
    rows.append(("step", f"{batch}, on {ranks} process{'es' if ranks > 1 else ''}"))
    if progress.tokens is not None:
        kind = "in pairs of answers, padding included" if "ref_checkpointer" in config else "in the loss"
        rows.append((f"tokens {kind}", f"{progress.tokens:,}"))
    rows += [(f"`{key}`", _plain(config[key])) for key in _VALUES if config.get(key) is not None]
    return rows


def _component(section: Mapping) -> str:
    """A section of a config in one line, such as ``AdamW(lr=1e-5)``."""
    arguments = ", ".join(f"{key}={_plain(value)}" for key, value in section.items() if key != "_component_")
    text = f"{str(section.get('_component_', '')).rpartition('.')[2]}({arguments})"
    return f"`{text.replace('`', chr(39))}`"


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "True", False: "False"}[value]
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


def _numbers(run_log: Path, step: int) -> list[str]:
    """What the run logged last of each number until a step, if anything."""
    found: dict[str, tuple[int, float]] = {}
    try:
        lines = [line for line in read_lines(run_log) if isinstance(line.get("step"), int) and line["step"] <= step]
    except OSError:  # the log is not needed for a checkpoint
        return []
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "time") and not name.startswith(_OF_THE_RUN):
                found[name] = (line["step"], float(value))
    rows = [(f"`{name}`", f"{value:.4g}", at) for name, (at, value) in found.items() if not math.isnan(value)]
    if not rows:
        return []
    note = "The last that the training logged; `loss` is that of one step's data, `..._before` that before training."
    return ["## Numbers", _table(("number", "value", "at step"), rows), note]


def _how_to_load(folder: Path) -> list[str]:
    tokenizer_config = read_json_object(folder / "tokenizer_config.json") or {}
    has_chat = "chat_template" in tokenizer_config or (folder / "chat_template.jinja").is_file()
    prompt = 'tokenizer("Once upon a time", return_tensors="pt")'
    if has_chat:
        prompt = (
            'tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True,\n'
            '                                       return_tensors="pt", return_dict=True)'
        )
    return [
        "## Use",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the hub\n'
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        f"inputs = {prompt}\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))\n"
        "```",
    ]


def _how_to_apply(base: Base) -> str:
    return (
        f"This folder has no weights but `{DELTA}`, what changed of `{base.name}`: with a folder of that model, "
        f"`gmt-tune apply BASE {DELTA} DIR` makes the whole one."
    )


def _licence(base: Base, folder: Path) -> str:
    known = base.license.get("license_name") or base.license.get("license")
    known = ", ".join(map(str, known)) if isinstance(known, list) else known
    of_base = f" ({known})" if known else ", which its folder did not name,"
    # The base's own, which are copied
    names = ("license", "licence", "notice", "use_policy")
    files = [file.name for file in sorted(folder.iterdir()) if file.name.lower().startswith(names)]
    beside = f" {', '.join(f'`{file}`' for file in files)} in this folder came with it." if files else ""
    return f"The base model's licence{of_base} applies.{beside} Check the licence of the data before you publish."


def _command(config: Mapping, world_size: int) -> list[str]:
    """The command of this run, with overrides as the config has them; nothing where none started the recipe."""
    if "--config" not in sys.argv[1:-1]:
        return []
    at = sys.argv.index("--config")
    file = sys.argv[at + 1]
    names = {str(path): name for name, path in config_paths().items()}
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    words = ["tune", "run"]
    words += ["--nnodes", str(world_size // per_node)] if world_size > per_node else []
    words += ["--nproc_per_node", str(per_node)] if world_size > 1 else []
    words += [Path(sys.argv[0]).stem, "--config", names.get(file) or Path(file).name]
    values = OmegaConf.create(dict(config))
    for override in sys.argv[1:at] + sys.argv[at + 2 :]:
        key = override.partition("=")[0]
        if key.startswith("~"):
            words.append(key)
        elif (value := OmegaConf.select(values, key)) is not None:
            shown = f"[{','.join(map(_plain, value))}]" if isinstance(value, ListConfig) else _plain(value)
            words.append(f"{key}={shown}")
    return ["```sh\n" + shlex.join(words) + "\n```"]


def _versions() -> str:
    found = [f"{name} {version}" for name in _PACKAGES if (version := installed_version(name)) is not None]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _table(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    is_long = len(text) > _LONGEST_CELL
    return text[:_LONGEST_CELL] + ("...`" if text.startswith("`") else "...") if is_long else text
