"""The text of a config file: what all configs have in common, with the comment of each knob.

``make_configs`` says what sets each of them apart.
"""

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """One pretrained model: where it comes from and what torchtune calls it."""

    title: str
    repo: str
    component: str
    tokenizer: str
    tokenizer_file: str
    files: tuple[str, int]  # file name format, number of files
    model_type: str
    ignore: str  # what `tune download` leaves out
    lr: str
    sharded: str = "['tok_embeddings', 'output']"
    token: bool = True  # whether the download needs a token

    @property
    def folder(self) -> str:
        return f"/tmp/{self.repo.split('/')[1]}"

    @property
    def download(self) -> str:
        token = " --hf-token <HF_TOKEN>" if self.token else ""
        return f'tune download {self.repo} --output-dir {self.folder} --ignore-patterns "{self.ignore}"{token}'


ADAMW = """  _component_: torch.optim.AdamW  # States in the weights' dtype: 4 bytes a parameter in bf16
  lr: {lr}
  weight_decay: {decay}  # Decay moves every weight, also those whose gradient the mask zeroes
  fused: True  # One kernel, no copies
# Updates of less than 1/512 of a bf16 weight are rounded away. torchao.optim.AdamW8bit with bf16_stochastic_round: True
# lets them through on average, with half the state memory.
"""
TORCHAO = """  _component_: torchao.optim.{name}  # {bits} bits: {size} a parameter. Compiles at the first step
  lr: {lr}
  weight_decay: {decay}  # Decay moves every weight, also those whose gradient the mask zeroes
  bf16_stochastic_round: True  # Small updates reach bf16 weights on average, instead of being rounded away
"""
OPTIMIZERS = {
    "AdamW": ADAMW,
    "AdamW8bit": TORCHAO.replace("{name}", "AdamW8bit").replace("{bits}", "8").replace("{size}", "2 bytes"),
    "AdamW4bit": TORCHAO.replace("{name}", "AdamW4bit").replace("{bits}", "4").replace("{size}", "1 byte"),
}

ALPACA = """  _component_: torchtune.datasets.alpaca_dataset
"""


REFERENCE = """# The model before training, which answers are compared with: never one that is being trained
ref_checkpointer:
"""
CE_LOSS = """  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
"""
DPO_LOSS = """  _component_: torchtune.rlhf.loss.DPOLoss  # Or torchtune.rlhf.loss.RSOLoss, with gamma in place of beta
  beta: 0.1  # Small values let the model move further from the reference
  label_smoothing: 0.0  # Share of pairs that are taken to be the wrong way round
"""


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
    dense: str = '["*norm*"]'
    tensor_parallel: bool = False
    dataset: str = ALPACA
    prompt: str = ""  # lines below the tokenizer's
    notes: str = ""  # a further paragraph at the top
    preferences: bool = False  # DPO: two models, and a data set of pairs
    held_out: str = ""  # the section dataset_val; none if empty


def render(name: str, c: Config, memory: str) -> str:
    """The file of one config; ``memory`` is the sentence on what it needs."""
    m = c.model
    family, _, stem = name.partition("/")
    several = c.devices * c.nodes > 1
    launch = f"--nproc_per_node {c.devices} " if c.devices > 1 else ""
    if c.nodes > 1:
        launch = f"--nnodes {c.nodes} {launch}--rdzv_id 1 --rdzv_backend c10d --rdzv_endpoint <FIRST_NODE>:29500 "
    run = f"tune run {launch}{'gmt_full_dpo' if c.preferences else 'gmt_full_finetune'} --config {name}"
    head = [f"Gradient-mask tuning of {m.title} {c.purpose}.", "", memory]
    head += ["", *textwrap.wrap(c.notes, 112)] if c.notes else []
    head += ["", "This config assumes that you have downloaded the model first:", f"  {m.download}"]
    head += ["", "Then train with:" if c.nodes == 1 else "Then train with, on each node (docs/multi_node.md):"]
    head += [f"  {run}"]
    if several and c.nodes == 1:
        head += ["or on another number of cards, even one if it holds it, with another --nproc_per_node."]
    head += ["", "Any key can be overridden at the end of that line, for example:"]
    models = "checkpointer.checkpoint_dir=<YOUR_CHECKPOINT_DIR>"
    if c.preferences:
        models += f" ref_{models}"
    head += [f"  tune run ... {models} gradient_mask.density=0.1"]
    header = "".join(f"# {line}".rstrip() + "\n" for line in head)

    pattern, count = m.files
    if count > 8:
        files = f'\n    filename_format: {pattern}\n    max_filename: "{count:05d}"'
    else:
        names = [pattern.format(f"{i:05d}", f"{count:05d}") for i in range(1, count + 1)]
        files = " [\n" + ",\n".join(f"    {file}" for file in names) + "\n  ]"
    optimizer = OPTIMIZERS[c.optimizer].format(lr=c.lr or m.lr, decay=c.decay)
    checkpointer = f"""  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {m.folder}
  checkpoint_files:{files}
  recipe_checkpoint: null
  output_dir: ${{output_dir}}
  model_type: {m.model_type}
"""
    samples, reference, loss = "Samples", "", CE_LOSS
    if c.preferences:
        samples, reference, loss = "Pairs", REFERENCE + checkpointer, DPO_LOSS
    accumulation = "Micro-batches in one step; the mask sees their whole gradient"
    if c.in_backward:
        accumulation = "Must stay 1 with optimizer_in_bwd: True"
    return f"""{header}
output_dir: /tmp/gmt-tune/{family}_{stem}  # /tmp may be deleted by your system. Change it to your preference.

# Model
model:
  _component_: {m.component}
{_parallelism(c) if c.tensor_parallel else ""}
# Tokenizer
tokenizer:
  _component_: {m.tokenizer}
  path: {m.folder}/{m.tokenizer_file}
  max_seq_len: {c.max_seq_len}  # Longer samples are cut. Activations grow with it
{c.prompt}
# Dataset
dataset:
{c.dataset}{_held_out(c)}batch_size_val: null  # null: as batch_size
seed: null  # A number makes what is random (such as dropout) the same each time; the order of the data always is
shuffle: True

# Checkpoints
checkpointer:
{checkpointer}{reference}resume_from_checkpoint: False  # True goes on from the newest checkpoint in output_dir
save_every_n_steps: null  # Optimizer steps between two checkpoints, besides the one at the end of each epoch
keep_last_n_checkpoints: null  # Delete older ones. null keeps all
enable_async_checkpointing: False  # True writes them while training goes on, from a copy in the host's memory

# Training
epochs: {c.epochs}  # The learning rate's schedule spreads over all: to go on with more makes it jump
max_steps_per_epoch: null  # A number ends each epoch early
batch_size: {c.batch_size}  # {samples} in one forward pass of one device. Activations grow with it
gradient_accumulation_steps: {c.accumulation}  # {accumulation}

optimizer:
{optimizer}# True steps each tensor in backward and frees its gradient: less memory. Needs gradient_accumulation_steps 1
optimizer_in_bwd: {c.in_backward}
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: {c.warmup}

# Which gradient entries reach the optimizer. Remove the section for plain full fine-tuning
gradient_mask:
  _component_: gmt_tune.GradientMask
  density: 0.2  # Fraction of gradient entries that is kept; Adam's momentum still moves the others. 1.0 keeps all
  score: magnitude  # Rank entries by abs(gradient). Also: saliency (abs(gradient * weight)), random
  scope: tensor  # Take the fraction of each tensor by itself. global: of all tensors together
  refresh_every: 1  # Optimizer steps between two selections, held at 1 bit an entry. null: select once
  dense: {c.dense}  # Name patterns of the parameters that are updated in full
  frozen: []  # Name patterns of the parameters that are not updated at all: no gradient, no optimizer state

loss:
{loss}clip_grad_norm: null  # A number scales longer gradients down to this norm, before the mask
on_nonfinite: error  # A loss or gradient that is not finite ends the run. skip: leave such steps out
compile: False  # torch.compile the model + loss, True increases speed and reduces memory, after minutes of compilation

# Training environment
device: cuda

# Memory management
enable_activation_checkpointing: True  # True keeps only each layer's input and computes the rest twice
enable_activation_offloading: {c.offloading}  # True moves those inputs to the host's memory meanwhile
{_fsdp(c) if several else ""}
# Precision
dtype: bf16  # fp32 doubles all memory

# Logging
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${{output_dir}}/logs
log_every_n_steps: 1
track_selection_every_n_steps: null  # Optimizer steps between two looks at overlap and coverage, at 2 bits an entry
write_report: False  # True draws output_dir/report.html when the run ends; `gmt-tune report` does so at any time
log_peak_memory_stats: True

# Profiler
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False  # True writes traces of a few steps
  output_dir: ${{output_dir}}/profiling_outputs
  cpu: True
  cuda: True
  profile_memory: False
  with_stack: False
  record_shapes: True
  with_flops: False
  wait_steps: 5  # Steps before the profiler warms up
  warmup_steps: 3
  active_steps: 2  # Steps that are recorded
  num_cycles: 1
"""


def _held_out(c: Config) -> str:
    packed = "  packed: False  # True fills each sequence up to max_seq_len with several samples: faster\n"
    every = "Optimizer steps between two validations. Needs dataset_val"
    if not c.held_out:
        section = "dataset_val: null  # A section like dataset: data whose loss is reported, and never trained on\n"
        section += f"run_val_every_n_steps: null  # {every}\n"
    else:
        section = (
            f"dataset_val:  # Data whose loss and accuracy are reported, and never trained on. null: none\n{c.held_out}"
        )
        section += f"run_val_every_n_steps: 200  # {every}\n"
    return section if c.preferences else packed + section


def _parallelism(c: Config) -> str:
    # A fused torch.optim.AdamW refuses tensor parallelism.
    fused = " (needs optimizer.fused=False)" if c.optimizer == "AdamW" else ""
    return f"""
# Parallelism
tensor_parallel_dim: 1  # Devices of one node that share each layer's matrices{fused}. The rest is FSDP2's
tensor_parallel_plan:
  _component_: torchtune.models.llama3.base_llama_tp_plan
"""


def _fsdp(c: Config) -> str:
    separately = "Gather these by themselves: less memory, a little slower"
    if c.model.sharded == "null":
        separately = "Not tok_embeddings, whose weights the output layer shares"
    return f"""custom_sharded_layers: {c.model.sharded}  # {separately}
fsdp_cpu_offload: False  # True holds weights, gradients and optimizer states in the host's memory: slow
fsdp_reshard_after_forward: True  # False keeps the gathered weights until backward: faster, more memory
"""
