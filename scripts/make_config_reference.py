"""Writes docs/config_reference.md: every key that a recipe takes, in one table.

    python scripts/make_config_reference.py          # writes it
    python scripts/make_config_reference.py --check  # writes nothing; exits with 1 if it differs

The keys, and which values they take, come from the config check (gmt_tune/integrations/torchtune/config_check.py);
keys within sections from the configs; what they mean, from the comments in the configs. Only what no config says is
said here, in MEANINGS: a key that has no meaning in either place is an error.
"""

import argparse
import inspect
import re
import sys
from pathlib import Path

from omegaconf import OmegaConf

from gmt_tune import GradientMask
from gmt_tune.integrations.torchtune import config_check
from gmt_tune.integrations.torchtune.plugin.registry import config_paths
from gmt_tune.integrations.torchtune.run import preference

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "config_reference.md"

# Sections in which a component decides on the keys: those that the configs use are listed, others may exist.
OPEN_SECTIONS = (
    "model", "tokenizer", "dataset", "dataset_val", "optimizer", "lr_scheduler", "loss", "metric_logger", "evaluation",
    "checkpointer", "tensor_parallel_plan",
)  # fmt: skip

# Keys whose values in the configs say nothing to others.
OF_THE_MODEL = (
    "output_dir", "tokenizer.path", "tokenizer.prompt_template", "checkpointer.checkpoint_dir",
    "checkpointer.checkpoint_files", "dataset.column_map", "dataset.source", "dataset.name",
)  # fmt: skip

# The config whose comment on a key is taken: the first of these that has one, then any other.
FIRST_CONFIGS = ("llama3_1/8B_gmt", "llama3_1/8B_gmt_low_memory", "llama3_3/70B_gmt_multinode")

MEANINGS = {
    "output_dir": "Folder of checkpoints, logs and the report",
    "model": "The model's builder; its arguments are keys of the section",
    "model.max_seq_len": "Longest sequence that fits, in tokens",
    "tokenizer": "The tokenizer of the model",
    "tokenizer.path": "The tokenizer's file, in the model's folder",
    "tokenizer.max_seq_len": "Longer samples are cut. Activations grow with it",
    "dataset": "The data to train on, or a list of such sections, whose rows are mixed",
    "dataset.source": "Name on the Hugging Face hub, or `json` with `data_files`",
    "dataset.name": "Configuration of the data set on the hub",
    "dataset.split": "Which part of the data set",
    "dataset.column_map": "Which columns are `input` and `output`",
    "dataset.size": "Rows that are taken. null: all",
    "dataset.train_on_input": "True puts the questions into the loss too",
    "seed": "A number makes what is random (stochastic rounding, dropout) the same each time, null draws another. The "
    "order of the data does not depend on it, nor does a random score, which has `gradient_mask.seed`",
    "shuffle": "False takes the rows in their order",
    "max_steps_per_epoch": "A number ends each epoch early. null: the whole epoch",
    "evaluation": "Called with the model before the first and after the last step; its numbers are printed and logged",
    "evaluation.size": "Questions that are asked. null: all",
    "evaluation.max_new_tokens": "Longer answers are cut",
    "evaluation.batch_size": "Questions that are answered at a time",
    "checkpointer": "Reads and writes the model's weights",
    "checkpointer.checkpoint_dir": "The model's folder",
    "checkpointer.checkpoint_files": "Its files with weights, or `filename_format` and `max_filename` for a range",
    "checkpointer.recipe_checkpoint": "Always null: `resume_from_checkpoint` finds the training state by itself",
    "checkpointer.output_dir": "Where the run's checkpoints go: `${output_dir}`",
    "checkpointer.model_type": "How the weights' names map to torchtune's, by family",
    "epochs": "Times that the data is gone through. The learning rate's schedule spreads over all: to go on with more "
    "makes it jump",
    "optimizer": "Any `torch.optim.Optimizer`; 8-bit, 4-bit and fp8 ones are in `torchao.optim`",
    "optimizer_in_bwd": "True steps each tensor in backward: less memory. Needs gradient_accumulation_steps 1",
    "optimizer.lr": "Learning rate at its highest",
    "lr_scheduler": "Learning rate over the optimizer steps. null keeps it as it is",
    "lr_scheduler.num_warmup_steps": "Optimizer steps in which the learning rate rises from 0",
    "gradient_mask._component_": "`gmt_tune.GradientMask`, or [a class of yours](extending/new_score.md)",
    "gradient_mask.seed": "Of the random score",
    "gradient_mask.error_if_nonfinite": "Set by the recipe: see `on_nonfinite`",
    "loss": "Cross-entropy, in chunks to spare memory; for `gmt_full_dpo` one of torchtune's losses of preferences",
    "dataset_val": "Data whose loss is reported, and never trained on; the keys of `dataset`",
    "batch_size_val": "Samples in one forward pass of the validation. null: as batch_size",
    "ref_checkpointer": "Of `gmt_full_dpo`, which needs it: the model before training; the keys of `checkpointer`",
    "device": "`cuda`, `cpu`, `xpu` or `npu`",
    "dtype": "Of weights, gradients and computation. fp32 doubles all memory",
    "compile": "torch.compile the model and the loss: faster, less memory, after minutes of compilation",
    "collate_fn": "How samples become a batch, as a dotted path",
    "ac_mode": "Which layers recompute with activation checkpointing: `full` or `selective`, as in torchtune",
    "ac_option": "With `ac_mode: selective`: every how many layers, or `op`",
    "tensor_parallel_dim": "Devices that share each layer; the rest of them share the data",
    "tensor_parallel_plan": "How layers are split over them, such as `torchtune.models.llama3.base_llama_tp_plan`",
    "cudnn_deterministic_mode": "PyTorch's deterministic CUDA algorithms, as torchtune's `set_seed` takes it",
    "enable_activation_offloading": "True moves checkpointed inputs to the host's memory meanwhile",
    "log_every_n_steps": "Optimizer steps between two lines of the log",
    "log_level": "Of torchtune's logger, such as `INFO`",
    "log_peak_memory_stats": "True logs the device's memory",
    "metric_logger": "torchtune's `DiskLogger`, `TensorBoardLogger`, `WandBLogger`, `CometLogger` or `StdoutLogger`",
    "metric_logger.log_dir": "Folder of the log",
    "profiler": "PyTorch's profiler",
    "profiler.output_dir": "Folder of the traces",
    "profiler.cpu": "Record the CPU",
    "profiler.cuda": "Record the GPU",
    "profiler.profile_memory": "Record allocations",
    "profiler.with_stack": "Record the Python lines",
    "profiler.record_shapes": "Record the tensors' shapes",
    "profiler.with_flops": "Estimate floating-point operations",
    "profiler.warmup_steps": "Steps in which it runs without recording",
    "profiler.num_cycles": "How often wait, warm-up and recording are repeated",
}  # fmt: skip

HEAD = """\
# Every key of a config

Made by `python scripts/make_config_reference.py` from the config check and the configs' own comments. A config is
checked before the model is loaded: a key that is misspelt, or a value that is out of range, is told in one sentence.

- **needed**: yes, if the recipe has no default.
- **takes**: the values that the check lets through. A *section* has a `_component_`, the dotted path of a class or
  function, and that component's arguments as keys: those of `GradientMask`, and of other components those that the
  configs use, are listed.
- **in the configs**: values of the configs that come with gmt-tune, the most frequent first.

Any key can be overridden on the command line (`gradient_mask.density=0.1`), and added. `~key` removes one, and
`~section` or `section=null` leaves out a section that the column below says may be null. Name patterns need quotes for
YAML, and quotes around them for the shell: `'gradient_mask.dense=["*norm*"]'`. In paths, which are the
keys that end in `dir`, `path`, `file`, `files`, `folder`, `root` or `source`, `~/` is your home folder.

A key that other values refer to as `${key}` is a variable of your own, and may have any name. One in the file that
nothing refers to any more, since an override has replaced what did, has no effect, which the log says, unless it looks
like a misspelt key, which is refused. So is any other unknown key on the command line.

A config is code: [what that means](configs.md#a-config-is-code).

| key | needed | takes | in the configs | meaning |
|---|---|---|---|---|
"""


def _comments(text: str) -> dict[str, str]:
    """The comment on each key of a config: behind it, or in the lines right above it."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        if line.startswith("# "):
            above.append(line[2:].strip())
            continue
        match = re.match(r"^( *)(\w+):(?:\s.*?)?(?:\s+# (.*))?$", line)
        if match is None:
            above = []
            continue
        indent, key, behind = len(match[1]), match[2], match[3]
        while path and path[-1][0] >= indent:
            path.pop()
        path.append((indent, key))
        comment = behind or " ".join(above)
        if len(comment.split()) > 2:  # fewer words are a heading
            found[".".join(name for _, name in path)] = comment
        above = []
    return found


def _values(configs: dict) -> dict[str, list]:
    """Key, with those of sections as `section.key`, to its value in each config that has it."""
    found: dict[str, list] = {}
    for cfg in configs.values():
        for key, value in cfg.items():
            is_section = isinstance(value, dict) and "_component_" in value
            found.setdefault(key, []).append(value["_component_"] if is_section else value)
            for inner, inner_value in value.items() if is_section else ():
                if inner != "_component_":
                    found.setdefault(f"{key}.{inner}", []).append(inner_value)
    return found


def _takes(key: str) -> str:
    or_null = " or null"
    for keys, text in (
        (config_check._BOOLS, "True or False"),
        (config_check._COUNTS, "a whole number from 1 on"),
        (config_check._COUNTS_OR_NULL, "a whole number from 1 on, or null"),
    ):
        if key in keys:
            return text
    if key in config_check._CHOICES:
        return " or ".join(f"`{choice}`" for choice in config_check._CHOICES[key])
    if key in preference.OWN_KEYS:
        return "a section"
    if key in config_check._GIVEN or key in ("gradient_mask", "profiler", "tensor_parallel_plan"):
        return "a section" + ("" if key in config_check._REQUIRED else or_null)
    return {
        "output_dir": "the path of a folder",
        "seed": "a whole number from 0 on, or null",
        "clip_grad_norm": "a number above 0, `inf` to only log the norm, or null",
        "device": "`cuda`, `cuda:1`, `cpu`, ...",
        "optimizer.lr": "a number from 0 on",
        "gradient_mask.density": "a number above 0, at most 1",
        "gradient_mask.score": "`magnitude`, `saliency` or `random`",
        "gradient_mask.scope": "`tensor` or `global`",
        "gradient_mask.refresh_every": "a whole number from 1 on, or null",
        "gradient_mask.dense": "a list of name patterns",
        "gradient_mask.frozen": "a list of name patterns",
        "gradient_mask.seed": "a whole number",
        "enable_async_checkpointing": "True or False",
    }.get(key, "")


def _shown(values: list) -> str:
    """The values of the configs, the most frequent first."""
    texts = [_text(value) for value in values]
    ordered = sorted(dict.fromkeys(texts), key=lambda text: -texts.count(text))
    kept = ordered[:3] if all(len(text) < 40 for text in ordered[:3]) else ordered[:1]
    more = len(ordered) - len(kept)
    return ", ".join(f"`{text}`" for text in kept) + (f" and {more} more" if more else "")


def _text(value) -> str:
    if value is None:
        return "null"
    if isinstance(value, list) and len(value) > 3:
        return "[" + ", ".join(map(str, value[:1])) + ", ...]"
    return str(value)


def build() -> str:
    """The page's text.

    Raises:
        SystemExit: if a key has no meaning: comment it in a config, or add it to MEANINGS.
    """
    paths = config_paths()
    order = sorted(paths, key=lambda name: (name not in FIRST_CONFIGS, "dpo" in name, name))
    raw = {name: OmegaConf.to_container(OmegaConf.load(paths[name]), resolve=False) for name in order}
    values = _values(raw)
    comments: dict[str, str] = {}
    for name in order:
        for key, comment in _comments(paths[name].read_text(encoding="utf-8")).items():
            comments.setdefault(key, comment)
    top = [*config_check._REQUIRED, *config_check._OPTIONAL, *preference.OWN_KEYS]
    # A config's own variables, which others refer to, are no keys of the recipe
    top_and_mask = [*top, *(f"gradient_mask.{name}" for name in inspect.signature(GradientMask).parameters)]
    keys = [key for key in values if key.split(".")[0] in top] + [key for key in top_and_mask if key not in values]
    keys.remove("gradient_mask.named_parameters")  # given by the recipe
    alike = ("tensor_parallel_plan.", "dataset_val.", "ref_checkpointer.")  # the last two as those without the prefix
    keys = [key for key in keys if not key.startswith(alike)]
    rows = []
    for key in sorted(keys, key=lambda key: (_rank(key.split(".")[0], values), "." in key)):
        meaning = MEANINGS.get(key) or comments.get(key)
        if meaning is None and key.split(".")[0] in OPEN_SECTIONS and "." in key:
            continue  # an argument of a component, whose own documentation has it
        if meaning is None:
            raise SystemExit(f"{key} has no comment in any config and no entry in MEANINGS of {Path(__file__).name}")
        needed = "yes" if key in config_check._REQUIRED else ""
        shown = _shown(values[key]) if key in values and key not in OF_THE_MODEL else ""
        cells = (f"`{key}`", needed, _takes(key), shown, meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return HEAD + "".join(rows)


def _rank(key: str, values: dict) -> int:
    """Keys in the order in which the configs have them; those that no config has at the end."""
    order = [name for name in values if "." not in name]
    return order.index(key) if key in order else len(order)


def main() -> int:
    """Write the page, or check it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page differs")
    args = parser.parse_args()
    text = build()
    if args.check:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
