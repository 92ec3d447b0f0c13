"""The text of a config file, from the table of keys and what sets the config apart (``make_configs`` says what)."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

from released_models import Model

from gmt_tune.integrations.torchtune.config.keys import GROUPS, KEYS, find, listed_as

WIDTH = 120

# What all configs have besides the defaults that the table shows; YAML text by key.
COMMON = {
    "seed": "null",
    "shuffle": "True",
    "checkpointer.recipe_checkpoint": "null",
    "checkpointer.output_dir": "${output_dir}",
    "resume_from_checkpoint": "False",
    "max_steps_per_epoch": "null",
    "lr_scheduler._component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "gradient_mask._component_": "gmt_tune.GradientMask",
    "device": "cuda",
    "enable_activation_checkpointing": "True",
    "dtype": "bf16",
    "metric_logger._component_": "torchtune.training.metric_logging.DiskLogger",
    "metric_logger.log_dir": "${output_dir}/logs",
    "log_peak_memory_stats": "True",
    "profiler._component_": "torchtune.training.setup_torch_profiler",
    "profiler.enabled": "False",
    "profiler.output_dir": "${output_dir}/profiling_outputs",
    "profiler.cpu": "True",
    "profiler.cuda": "True",
    "profiler.profile_memory": "False",
    "profiler.with_stack": "False",
    "profiler.record_shapes": "True",
    "profiler.with_flops": "False",
    "profiler.wait_steps": "5",
    "profiler.warmup_steps": "3",
    "profiler.active_steps": "2",
    "profiler.num_cycles": "1",
}

TORCHAO = "Compiles at the first step"
OPTIMIZERS = {
    "AdamW": {
        "_component_": "torch.optim.AdamW  # States in the weights' dtype: 4 bytes a parameter in bf16. Updates of "
        "less than 1/512 of a bf16 weight are rounded away: torchao.optim.AdamW8bit with bf16_stochastic_round: True "
        "lets them through on average, with half the state memory",
        "fused": "True",
    },
    "AdamW8bit": {
        "_component_": f"torchao.optim.AdamW8bit  # 8 bits: 2 bytes a parameter. {TORCHAO}",
        "bf16_stochastic_round": "True",
    },
    "AdamW4bit": {
        "_component_": f"torchao.optim.AdamW4bit  # 4 bits: 1 byte a parameter. {TORCHAO}",
        "bf16_stochastic_round": "True",
    },
    "CompactAdamW": {
        "_component_": "gmt_tune.CompactAdamW  # Gradients and states of selected entries alone: about 8 bytes each",
        "state_bits": "8",
        "bf16_stochastic_round": "True",
    },
}
CE_LOSS = {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}
LINEAR_CE_LOSS = {
    "_component_": "gmt_tune.models.losses.LinearCrossEntropyLoss  # The output layer computes it and its gradients in "
    "chunks: no logits are kept",
}
DPO_LOSS = {
    "_component_": "torchtune.rlhf.loss.DPOLoss  # Or torchtune.rlhf.loss.RSOLoss, with gamma in place of beta",
    "beta": "0.1",
    "label_smoothing": "0.0",
}
# What the section dataset may be in place of the config's own; docs/data.md has more.
OWN_DATA = """\
  # Your own file in place of it (csv and parquet too; docs/data.md). Chats:
  # _component_: torchtune.datasets.chat_dataset
  # source: json
  # data_files: my_chats.jsonl
  # conversation_column: messages  # The column with the lists of messages
  # conversation_style: openai  # role and content; sharegpt: from and value
  # Or questions with answers:
  # _component_: torchtune.datasets.instruct_dataset
  # source: json
  # data_files: my_answers.jsonl
  # column_map: {input: question, output: answer}  # Your columns behind the colons
  # Or plain text:
  # _component_: torchtune.datasets.text_completion_dataset
  # source: json
  # data_files: my_texts.jsonl
  # column: text  # The column with the text"""
OWN_PAIRS = """\
  # Your own file in place of it (parquet too; docs/data.md): in each row two conversations, lists of role and content
  # _component_: torchtune.datasets.preference_dataset
  # source: json
  # data_files: my_pairs.jsonl
  # column_map: {chosen: chosen, rejected: rejected}  # Your columns behind the colons"""
ALPACA = {"_component_": "torchtune.datasets.alpaca_dataset"}


@dataclass(frozen=True)
class Config:
    """What sets one config apart. Defaults are those of one device without special measures."""

    model: Model
    purpose: str  # ends the first sentence of the file
    card: str  # the smallest card that it must fit on
    devices: int = 1
    nodes: int = 1
    optimizer: str = "AdamW8bit"
    in_backward: bool = False
    offloading: bool = False
    batch_size: int = 2
    accumulation: int = 8
    max_seq_len: int = 2048
    epochs: int = 1
    lr: str = ""
    warmup: int = 100
    decay: str = "0.01"
    dense: str = ""  # if not the model's
    density: str = "0.2"
    refresh: str = "1"
    clip: str = "null"
    tensor_parallel: bool = False
    dataset: Mapping[str, str] = field(default_factory=lambda: ALPACA)
    prompt: str = ""  # the tokenizer's template, if not its own
    notes: str = ""  # a further paragraph at the top
    held_out: Mapping[str, str] | None = None  # the section dataset_val
    preferences: bool = False  # DPO: two models, and a data set of pairs

    @property
    def paragraphs(self) -> list[str]:
        """What the top of the file says besides purpose, memory, download and run line."""
        plan = ""
        if self.devices * self.nodes > 1 and self.model.why_no_plan:
            plan = f"No tensor-parallel plan fits this model: {self.model.why_no_plan}."
        return [text for text in (self.notes, plan, self.model.note) if text]

    def values(self) -> dict[str, str]:
        """YAML text by key, besides what all configs have."""
        model = self.model
        found = {
            "model._component_": model.builder,
            "tokenizer._component_": model.tokenizer,
            "tokenizer.path": f"{model.folder}/{model.tokenizer_file}",
            "tokenizer.max_seq_len": f"{self.max_seq_len}",
            **_section("tokenizer", model.tokenizer_keys),
            **_section("dataset", self.dataset),
            **_section("checkpointer", model.weights),
            "epochs": f"{self.epochs}",
            "batch_size": f"{self.batch_size}",
            "gradient_accumulation_steps": f"{self.accumulation}",
            **_section("optimizer", OPTIMIZERS[self.optimizer]),
            "optimizer.lr": self.lr or model.lr,
            "optimizer.weight_decay": self.decay,
            "optimizer_in_bwd": f"{self.in_backward}",
            "lr_scheduler.num_warmup_steps": f"{self.warmup}",
            "gradient_mask.density": self.density,
            "gradient_mask.refresh_every": self.refresh,
            "gradient_mask.dense": self.dense or model.dense,
            "clip_grad_norm": self.clip,
            **_section("loss", DPO_LOSS if self.preferences else CE_LOSS),
            "enable_activation_offloading": f"{self.offloading}",
        }
        if self.optimizer == "CompactAdamW":
            if not self.tensor_parallel:  # which cuts the output layer
                found |= _section("loss", LINEAR_CE_LOSS)
            found["optimizer.weight_decay"] += "  # Of selected entries: the others stand still"
            found["gradient_mask.density"] += (
                "  # Fraction of entries that are selected. Each costs memory: see the top"
            )
            found["gradient_mask.refresh_every"] += "  # Optimizer steps between two selections; layers take turns"
            found["clip_grad_norm"] += "  # To this norm of what is applied: selected entries and dense parameters"
        if self.prompt:
            found["tokenizer.prompt_template"] = self.prompt
        if self.in_backward:
            found["gradient_accumulation_steps"] += "  # Must stay 1 with optimizer_in_bwd: True"
        if self.held_out is not None:
            found |= {"dataset_val": "", **_section("dataset_val", self.held_out), "run_val_every_n_steps": "200"}
        if self.preferences:
            common = {name.partition(".")[2]: text for name, text in COMMON.items() if name.startswith("checkpointer.")}
            found |= _section("ref_checkpointer", common | model.weights)
        else:
            found["dataset.packed"] = "False"
        if self.tensor_parallel:
            found["tensor_parallel_dim"] = "1"
            found["tensor_parallel_plan._component_"] = model.tensor_parallel_plan
        if self.devices * self.nodes > 1:
            layers = "null  # Not tok_embeddings, whose weights the output layer shares"
            found["custom_sharded_layers"] = layers if model.is_tied else "['tok_embeddings', 'output']"
            found |= {"fsdp_cpu_offload": "False", "fsdp_reshard_after_forward": "True"}
        return found


def _section(name: str, keys: Mapping[str, str]) -> dict[str, str]:
    return {f"{name}.{key}": text for key, text in keys.items()}


def render(name: str, c: Config, memory: str) -> str:
    """The file of one config; ``memory`` is the sentence on what it needs."""
    values = {key.name: _yaml(key.default) for key in KEYS.values() if key.shown} | COMMON | c.values()
    folder = f"/tmp/gmt-tune/{name.replace('/', '_')}"
    values["output_dir"] = f"{folder}  # Checkpoints, logs and report go here; your system may empty /tmp"
    blocks = ["".join(f"# {line}".rstrip() + "\n" for line in _head(name, c, memory))]
    for title, keys in GROUPS.items():
        lines = []
        for key in (key.name for key in keys if "." not in key.name):
            inner = sorted((name for name in values if name.startswith(f"{key}.")), key=_rank)
            if inner or key in values:
                lines += [line for name in (key, *inner) for line in _lines(name, values.get(name, ""))]
            if key == "dataset":
                lines += (OWN_PAIRS if c.preferences else OWN_DATA).splitlines()
        if lines:
            heading = [] if title == "Output" else [f"# {title}"]
            blocks.append("".join(f"{line}\n" for line in heading + lines))
    return "\n".join(blocks)


def _lines(name: str, text: str) -> list[str]:
    """A key with its value, and its comment behind it or above it: the value's own, or else the table's."""
    section, _, key = name.rpartition(".")
    indent = "  " if section else ""
    first, *rest = text.split("\n")
    value, _, comment = first.partition("  # ")
    entry = find(name)
    comment = comment or (entry.comment if entry is not None else "")
    line = f"{indent}{key}: {value}".rstrip()
    if not comment:
        return [line, *rest]
    if len(f"{line}  # {comment}") <= WIDTH:
        return [f"{line}  # {comment}", *rest]
    prefix = f"{indent}# "
    return [*textwrap.wrap(comment, WIDTH, initial_indent=prefix, subsequent_indent=prefix), line, *rest]


def _rank(name: str) -> int:
    """Where the table has a key of a section; the component comes first."""
    names = list(KEYS)
    return names.index(listed_as(name)) if listed_as(name) in names else -1


def _yaml(value: object) -> str:
    return "null" if value is None else str(value)


def _head(name: str, c: Config, memory: str) -> list[str]:
    launch = f"--nproc_per_node {c.devices} " if c.devices > 1 else ""
    if c.nodes > 1:
        launch = f"--nnodes {c.nodes} {launch}--rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint <FIRST_NODE>:29500 "
    run = f"tune run {launch}{'gmt_full_dpo' if c.preferences else 'gmt_full_finetune'} --config {name}"
    head = [f"Gradient-mask tuning of {c.model.title} {c.purpose}.", "", memory]
    for paragraph in c.paragraphs:
        head += ["", *textwrap.wrap(paragraph, 112)]
    head += ["", "This config assumes that you have downloaded the model first:", f"  {c.model.download}"]
    head += ["", "Then train with:" if c.nodes == 1 else "Then train with, on each node (docs/multi_node.md):"]
    head += [f"  {run}"]
    if c.devices > 1 and c.nodes == 1:
        head += ["or on another number of cards, even one if it holds it, with another --nproc_per_node."]
    head += ["", "Any key can be overridden at the end of that line, for example:"]
    models = "checkpointer.checkpoint_dir=<YOUR_CHECKPOINT_DIR>"
    if c.preferences:
        models += f" ref_{models}"
    return [*head, f"  tune run ... {models} gradient_mask.density=0.1"]
