"""The one table of a config's keys: values, default, what it does, and whether a resumed run may have another value.

The config check, the configs that ``scripts/make_configs.py`` writes, ``docs/config_reference.md`` and the comparison
of a resumed run with its checkpoint read it. A section's component decides which keys the section takes, and checks
them: of those, the table has what our configs use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


def is_number(value: object) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Takes:
    """The values of a key: in words behind "must be", and as a test, without which the key's component checks them."""

    words: str
    allows: Callable[[Any], bool] = lambda value: True

    @property
    def or_null(self) -> Takes:
        """These, or null."""
        return replace(self, words=f"{self.words} or null", allows=lambda value: value is None or self.allows(value))


@dataclass(frozen=True)
class Component(Takes):
    """A section with ``_component_``, which the recipe calls with the section's keys and what else it gives."""

    words: str = "a section"
    positional: int = 0
    names: tuple[str, ...] = ()


def _whole(first: int, below: float, words: str) -> Takes:
    return Takes(words, lambda value: isinstance(value, int) and is_number(value) and first <= value < below)


def _one_of(*choices: Any) -> Takes:
    words = ["or null" if choice is None else str(choice) for choice in choices]
    return Takes(f"one of {', '.join(words)}", lambda value: value in choices)


def _is_device(value: object) -> bool:
    return re.fullmatch(r"(cpu|cuda|xpu|npu)(:\d*)?", str(value)) is not None


BOOL = Takes("True or False", lambda value: isinstance(value, (bool, type(None))))
COUNT = _whole(1, float("inf"), "a whole number from 1 on")
SEED = replace(_whole(0, 2**32, "").or_null, words=f"a whole number from 0 to {2**32 - 1}, or null for a random one")
LR = Takes("a number from 0 on, such as 2e-5", lambda value: value is None or is_number(value) and value >= 0)
NORM = Takes(
    "a positive number, 'inf' to only log the norm, or null",
    lambda value: value in (None, "inf") or is_number(value) and value > 0,
)
DEVICE = Takes("cuda, cpu, xpu or npu", _is_device)
FOLDER = Takes("the path of a folder", lambda value: isinstance(value, str) and value != "")
PATTERNS, ANY = Takes("a list of name patterns"), Takes("")
SECTION, PART = Takes("a section"), Component()  # the recipe checks the first by itself
DATA, SCHEDULE = Component(positional=1), Component(positional=1, names=("num_training_steps", "last_epoch"))
WEIGHTS = Component(names=("should_load_recipe_state",))

NEEDED = "needed"  # as a default: a config must have the key
OF_COMPONENT = ""  # what the section's component has


@dataclass(frozen=True)
class Key:
    """A key of a config.

    Args:
        name: with its section's: ``optimizer.lr``.
        takes: the values that it takes.
        comment: what it does, or what turning it does.
        default: what holds where a config does not have it; NEEDED if every config must.
        may_differ: a run that is resumed may have another value: it changes no number of the training. With a section,
            all its keys may differ.
        shown: with its default in the configs that are made, where they set nothing else.
        recipe: the one that has it, if not all do.
    """

    name: str
    takes: Takes
    comment: str
    default: Any = OF_COMPONENT
    may_differ: bool = False
    shown: bool = False
    recipe: str = ""


# By the parts of a config, in the order in which configs have them.
# fmt: off
GROUPS: dict[str, tuple[Key, ...]] = {
    "Output": (
        Key("output_dir", FOLDER, "Folder of checkpoints, logs and the report", NEEDED, may_differ=True),
    ),
    "Model": (
        Key("model", PART, "The model's builder; its arguments are keys of the section", NEEDED),
        Key("model.max_seq_len", ANY, "Longest sequence that fits, in tokens"),
    ),
    "Parallelism": (
        Key("tensor_parallel_dim", COUNT, "Devices of one node that share each layer; the rest is FSDP2's. Needs "
            "optimizer.fused=False", 1),
        Key("tensor_parallel_plan", PART.or_null, "How each layer is split over them", None),
    ),
    "Tokenizer": (
        Key("tokenizer", PART, "The tokenizer of the model", NEEDED),
        Key("tokenizer.path", ANY, "Its file, in the model's folder"),
        Key("tokenizer.max_seq_len", ANY, "Longer samples are cut. Activations grow with it"),
        Key("tokenizer.prompt_template", ANY, "What is put before and after each message"),
    ),
    "Dataset": (
        Key("dataset", DATA, "The data to train on, or a list of such sections, whose rows are mixed", NEEDED),
        Key("dataset.source", ANY, "Name on the Hugging Face hub, or json with data_files"),
        Key("dataset.name", ANY, "Configuration of the data set on the hub"),
        Key("dataset.split", ANY, "Which part of the data set"),
        Key("dataset.column_map", ANY, "Which columns are which part of a sample"),
        Key("dataset.conversation_column", ANY, "Which column holds the messages"),
        Key("dataset.conversation_style", ANY, "How messages are written: openai or sharegpt"),
        Key("dataset.train_on_input", ANY, "True trains on the questions too"),
        Key("dataset.size", ANY, "Rows that are taken. null: all"),
        Key("dataset.packed", ANY, "True fills each sequence up to max_seq_len with several samples: faster"),
        Key("dataset_val", DATA.or_null, "A section like dataset: data whose loss is reported, and never trained on",
            None, may_differ=True, shown=True),
        Key("run_val_every_n_steps", COUNT.or_null, "Optimizer steps between two validations. Needs dataset_val", None,
            may_differ=True, shown=True),
        Key("batch_size_val", COUNT.or_null, "Samples in one forward pass of the validation. null: as batch_size", None,
            may_differ=True, shown=True),
        Key("seed", SEED, "A number makes what is random (such as dropout) the same each time; the order of the data "
            "always is", NEEDED),
        Key("shuffle", BOOL, "False takes the rows in their order", NEEDED),
        Key("collate_fn", ANY, "How samples become a batch, as a dotted path", None),
    ),
    "Evaluation": (
        Key("evaluation", DATA.or_null, "Called with the model before the first and after the last step; its numbers "
            "are printed and logged", None, may_differ=True),
        Key("evaluation.split", ANY, "Which questions"),
        Key("evaluation.size", ANY, "Questions that are asked. null: all"),
        Key("evaluation.max_new_tokens", ANY, "Longer answers are cut"),
        Key("evaluation.batch_size", ANY, "Questions that are answered at a time"),
    ),
    "Checkpoints": (
        Key("checkpointer", WEIGHTS, "Reads and writes the model's weights", NEEDED, may_differ=True),
        Key("checkpointer.checkpoint_dir", FOLDER, "The model's folder", NEEDED),
        Key("checkpointer.checkpoint_files", ANY, "Its files with weights, or filename_format with max_filename"),
        Key("checkpointer.recipe_checkpoint", ANY, "Always null: resume_from_checkpoint finds the training state"),
        Key("checkpointer.output_dir", FOLDER, "Where the run's checkpoints go", NEEDED),
        Key("checkpointer.model_type", ANY, "How the weights' names map to torchtune's, by family"),
        Key("ref_checkpointer", WEIGHTS, "The model before training, which answers are compared with: never one that "
            "is being trained", recipe="gmt_full_dpo"),
        Key("ref_checkpointer.checkpoint_dir", FOLDER, "That model's folder", NEEDED),
        Key("ref_checkpointer.output_dir", FOLDER, "Nothing is written there", NEEDED, may_differ=True),
        Key("resume_from_checkpoint", BOOL, "True goes on from the newest checkpoint in output_dir", NEEDED,
            may_differ=True),
        Key("save_every_n_steps", COUNT.or_null, "Optimizer steps between two checkpoints, besides the one at the end "
            "of each epoch", None, may_differ=True, shown=True),
        Key("keep_last_n_checkpoints", COUNT.or_null, "Delete older ones. null keeps all", None, may_differ=True,
            shown=True),
        Key("enable_async_checkpointing", BOOL, "True writes them while training goes on, from a copy in the host's "
            "memory", False, may_differ=True, shown=True),
    ),
    "Training": (
        Key("epochs", COUNT, "Times through the data. The learning rate's schedule spreads over all: to go on with "
            "more makes it jump", NEEDED, may_differ=True),
        Key("max_steps_per_epoch", COUNT.or_null, "A number ends each epoch early", NEEDED),
        Key("batch_size", COUNT, "Samples (or pairs) in one forward pass of one device. Activations grow with it",
            NEEDED),
        Key("gradient_accumulation_steps", COUNT, "Micro-batches in one step; the mask sees their whole gradient",
            NEEDED),
    ),
    "Optimizer": (
        Key("optimizer", DATA, "Any torch.optim.Optimizer; 8-bit, 4-bit and fp8 ones are in torchao.optim", NEEDED),
        Key("optimizer.lr", LR, "Learning rate at its highest"),
        Key("optimizer.eps", ANY, "8 bits round small second moments to 0: Adam then divides by eps alone, and 1e-8 "
            "makes steps huge"),
        Key("optimizer.weight_decay", ANY, "Decay moves every weight, also those whose gradient the mask zeroes"),
        Key("optimizer.fused", ANY, "One kernel, no copies"),
        Key("optimizer.bf16_stochastic_round", ANY, "Small updates reach bf16 weights on average, instead of being "
            "rounded away"),
        Key("optimizer_in_bwd", BOOL, "True steps each tensor in backward and frees its gradient: less memory. Needs "
            "gradient_accumulation_steps 1", False, shown=True),
        Key("lr_scheduler", SCHEDULE.or_null, "Learning rate over the optimizer steps. null keeps it as it is", None),
        Key("lr_scheduler.num_warmup_steps", ANY, "Optimizer steps in which the learning rate rises from 0"),
    ),
    "Gradient mask": (
        Key("gradient_mask", SECTION.or_null, "Which gradient entries reach the optimizer. Remove the section for "
            "plain full fine-tuning", None),
        Key("gradient_mask.density", Takes("a number above 0, at most 1"), "Fraction of gradient entries that is kept; "
            "Adam's momentum still moves the others. 1.0 keeps all", NEEDED),
        Key("gradient_mask.score", Takes("magnitude, saliency or random"), "Rank entries by abs(gradient). Also: "
            "saliency (abs(gradient * weight)), random", "magnitude", shown=True),
        Key("gradient_mask.scope", Takes("tensor or global"), "Take the fraction of each tensor by itself. global: of "
            "all tensors together", "tensor", shown=True),
        Key("gradient_mask.refresh_every", Takes(COUNT.or_null.words), "Optimizer steps between two selections, held "
            "at 1 bit an entry. null: select once", 1, shown=True),
        Key("gradient_mask.dense", PATTERNS, "Name patterns of the parameters that are updated in full", []),
        Key("gradient_mask.frozen", PATTERNS, "Name patterns of the parameters that are not updated at all: no "
            "gradient, no optimizer state", [], shown=True),
        Key("gradient_mask.seed", Takes("a whole number"), "Of the random score", 0),
        Key("gradient_mask.error_if_nonfinite", ANY, "Set by the recipe: see on_nonfinite"),
    ),
    "Loss": (
        Key("loss", PART, "Cross-entropy, in chunks to spare memory; gmt_full_dpo needs a loss of preferences", NEEDED),
        Key("loss.beta", ANY, "Small values let the model move further from the reference"),
        Key("loss.label_smoothing", ANY, "Share of pairs that are taken to be the wrong way round"),
        Key("clip_grad_norm", NORM, "A number scales longer gradients down to this norm, before the mask", None,
            shown=True),
        Key("on_nonfinite", _one_of("error", "skip"), "A loss or gradient that is not finite ends the run. skip: leave "
            "such steps out", "error", may_differ=True, shown=True),
        Key("compile", BOOL, "torch.compile the model + loss, True increases speed and reduces memory, after minutes "
            "of compilation", False, may_differ=True, shown=True),
    ),
    "Training environment": (
        Key("device", DEVICE, "cuda, cpu, xpu or npu; cuda:1 is the second card", NEEDED, may_differ=True),
        Key("cudnn_deterministic_mode", _one_of("default", "warn", "error", 0, 1, 2, None), "PyTorch's deterministic "
            "CUDA algorithms, as torchtune's set_seed takes it", None, may_differ=True),
    ),
    "Memory management": (
        Key("enable_activation_checkpointing", BOOL, "True keeps only each layer's input and computes the rest twice",
            False, may_differ=True),
        Key("ac_mode", _one_of("full", "selective", None), "Which layers do so", None, may_differ=True),
        Key("ac_option", ANY, "With ac_mode: selective: every how many layers, or op", None, may_differ=True),
        Key("enable_activation_offloading", BOOL, "True moves those inputs to the host's memory meanwhile", False,
            may_differ=True, shown=True),
        Key("custom_sharded_layers", ANY, "Gather these by themselves: less memory, a little slower", None,
            may_differ=True),
        Key("fsdp_cpu_offload", BOOL, "True holds weights, gradients and optimizer states in the host's memory: slow",
            False, may_differ=True),
        Key("fsdp_reshard_after_forward", BOOL, "False keeps the gathered weights until backward: faster, more memory",
            True, may_differ=True),
    ),
    "Precision": (
        Key("dtype", _one_of("bf16", "fp32"), "Of weights, gradients and computation. fp32 doubles all memory", NEEDED),
    ),
    "Logging": (
        Key("metric_logger", PART, "torchtune's DiskLogger, TensorBoardLogger, WandBLogger, CometLogger, StdoutLogger",
            NEEDED, may_differ=True),
        Key("metric_logger.log_dir", ANY, "Folder of the log"),
        Key("log_every_n_steps", COUNT, "Optimizer steps between two lines of the log", 1, may_differ=True, shown=True),
        Key("track_selection_every_n_steps", COUNT.or_null, "Optimizer steps between two looks at overlap and "
            "coverage, at 2 bits an entry", None, may_differ=True, shown=True),
        Key("write_report", BOOL, "True draws output_dir/report.html when the run ends; `gmt-tune report` does so at "
            "any time", False, may_differ=True, shown=True),
        Key("log_peak_memory_stats", BOOL, "True logs the device's memory", False, may_differ=True),
        Key("log_level", ANY, "Nothing reads it; torchtune's configs have it", None, may_differ=True),
    ),
    "Profiler": (
        Key("profiler", SECTION.or_null, "PyTorch's profiler", None, may_differ=True),
        Key("profiler.enabled", ANY, "True writes traces of a few steps"),
        Key("profiler.output_dir", ANY, "Folder of the traces"),
        Key("profiler.cpu", ANY, "Record the CPU"),
        Key("profiler.cuda", ANY, "Record the GPU"),
        Key("profiler.profile_memory", ANY, "Record allocations"),
        Key("profiler.with_stack", ANY, "Record the Python lines"),
        Key("profiler.record_shapes", ANY, "Record the tensors' shapes"),
        Key("profiler.with_flops", ANY, "Estimate floating-point operations"),
        Key("profiler.wait_steps", ANY, "Steps before the profiler warms up"),
        Key("profiler.warmup_steps", ANY, "Steps in which it runs without recording"),
        Key("profiler.active_steps", ANY, "Steps that are recorded"),
        Key("profiler.num_cycles", ANY, "How often wait, warm-up and recording are repeated"),
    ),
}
# fmt: on

KEYS: dict[str, Key] = {key.name: key for keys in GROUPS.values() for key in keys}

# Sections whose keys are those of another one.
_SAME_KEYS = {"dataset_val": "dataset", "ref_checkpointer": "checkpointer"}


def _without_index(name: str) -> str:
    return re.sub(r"\[\d+\]", "", name)


def listed_as(name: str) -> str:
    """The name of a key in the section that lists it: ``dataset.split`` for ``dataset_val[0].split``."""
    section, dot, inner = _without_index(name).partition(".")
    return f"{_SAME_KEYS.get(section, section)}.{inner}" if dot else section


def find(name: str) -> Key | None:
    """The entry of a key, such as ``dataset_val[0].split``; None if the table has none."""
    return KEYS.get(_without_index(name)) or KEYS.get(listed_as(name))


def may_differ(name: str) -> bool:
    """Whether a key, such as ``dataset[0].split``, may have another value in a run that goes on from a checkpoint."""
    parts = _without_index(name).split(".")
    entries = (KEYS.get(".".join(parts[:i])) for i in range(1, len(parts) + 1))
    return any(entry is not None and entry.may_differ for entry in entries)
