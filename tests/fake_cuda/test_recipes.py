"""Whole training steps of the recipes on CUDA, with small models: what the host waits for, and memory at the peak."""

import logging
import re

import pytest
import torch

pytestmark = [pytest.mark.fake_cuda, pytest.mark.filterwarnings("ignore")]

LLAMA = {
    "_component_": "torchtune.models.llama3.llama3",
    "vocab_size": 4096,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 2,
    "embed_dim": 256,
    "intermediate_dim": 1024,
    "max_seq_len": 512,
    "rope_base": 500_000,
    "norm_eps": 1e-5,
}
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-4, "fused": True}
SLOW_ADAMW = {**ADAMW, "fused": False}
SINGLE, LOW_MEMORY, COMPACT = (f"llama3_1/8B_gmt_{kind}" for kind in ("single_device", "low_memory", "compact"))
SEVERAL, DPO, DPO_OF_SEVERAL = "llama3_1/8B_gmt", "llama3_1/8B_gmt_dpo_single_device", "llama3_1/8B_gmt_dpo"

# Where reads are: that of CompactAdamW's counts, which make room for a new selection; on several ranks another one says
# how many ties each has room for
COUNTS, COUNTS_OF_RANKS = {"search/triton.py": 1}, {"search/triton.py": 1, "masking/ties.py": 1}
# With states on the CPU the mask works there, and the host has to know what is on the device before it can
ON_CPU = {"run/gradients.py": 2, "training/_grad_scaler.py": 1}

# By name: config, ranks, reads of a step that does not log by file (None: of each gradient, on its way to the CPU), and
# changes of the config
RUNS = {
    "single device": (SINGLE, 1, {}, {}),
    "no activation checkpointing": (SINGLE, 1, {}, dict(enable_activation_checkpointing=False)),
    "activations offloaded": (
        SINGLE,
        1,
        {},
        dict(enable_activation_checkpointing=True, enable_activation_offloading=True),
    ),
    "accumulation, clipping": (SINGLE, 1, {}, dict(gradient_accumulation_steps=4, clip_grad_norm=1.0)),
    "kept selections, saliency": (SINGLE, 1, {}, dict(gradient_mask={"refresh_every": 5, "score": "saliency"})),
    "random, PyTorch's AdamW": (SINGLE, 1, {}, dict(gradient_mask={"score": "random"}, optimizer=ADAMW)),
    "global, clipping, default AdamW": (
        SINGLE,
        1,
        {},
        dict(
            gradient_mask={"scope": "global"},
            optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-4},
            clip_grad_norm=1.0,
        ),
    ),
    "bad steps skipped": (SINGLE, 1, {"run/gradients.py": 1}, dict(on_nonfinite="skip")),
    "optimizer in backward": (
        SINGLE,
        1,
        {},
        dict(optimizer_in_bwd=True, gradient_accumulation_steps=1, clip_grad_norm=None, optimizer=ADAMW),
    ),
    "low memory": (LOW_MEMORY, 1, {}, {}),
    "compact": (COMPACT, 1, COUNTS, {}),
    "compact, accumulation, clipping": (
        COMPACT,
        1,
        COUNTS,
        dict(gradient_accumulation_steps=4, clip_grad_norm=1.0, gradient_mask={"refresh_every": 1}),
    ),
    "2 ranks": (SEVERAL, 2, {}, {}),
    "4 ranks, accumulation, clipping": (SEVERAL, 4, {}, dict(gradient_accumulation_steps=2, clip_grad_norm=1.0)),
    "2 ranks, optimizer in backward": (
        SEVERAL,
        2,
        {},
        dict(optimizer_in_bwd=True, gradient_accumulation_steps=1, clip_grad_norm=None, optimizer=ADAMW),
    ),
    "2 ranks, compact": (COMPACT, 2, COUNTS_OF_RANKS, {}),
    "4 ranks, compact": (COMPACT, 4, COUNTS_OF_RANKS, {}),
    "2 ranks, states on the CPU": (SEVERAL, 2, ON_CPU, dict(fsdp_cpu_offload=True, optimizer=SLOW_ADAMW)),
    "2 ranks, compact, states on the CPU": (COMPACT, 2, None, dict(fsdp_cpu_offload=True)),
    "tensor parallel 2": ("llama3_1/70B_gmt", 2, {}, dict(tensor_parallel_dim=2, optimizer=SLOW_ADAMW)),
    "tensor parallel 2 of 4 ranks, clipping": (
        "llama3_1/70B_gmt",
        4,
        {},
        dict(tensor_parallel_dim=2, optimizer=SLOW_ADAMW, clip_grad_norm=1.0),
    ),
    "preferences": (DPO, 1, {}, {}),
    "preferences, 2 ranks": (DPO_OF_SEVERAL, 2, {}, {}),
    "quickstart": ("quickstart", 1, COUNTS, {}),
    "quickstart of preferences": ("quickstart_dpo", 1, {}, {}),
}


def config_of(name: str, **changes):
    """A config that comes with the package, with a small model, short rows, and changes at its top level."""
    from omegaconf import OmegaConf

    from gmt_tune.cli.memory import load_config

    config = OmegaConf.to_container(load_config(name, [])[0])
    if name.startswith("llama"):
        config["model"] = dict(LLAMA)
    config["tokenizer"]["max_seq_len"] = 128
    for key, value in changes.items():
        is_section = isinstance(value, dict) and "_component_" not in value
        config[key] = {**config[key], **value} if is_section else value
    return OmegaConf.create(config)


def by_file(reads) -> dict[str, int]:
    found: dict[str, int] = {}
    for where, number in reads.items():
        file = re.search(r" at (\S+):\d+$", where)
        found[file[1] if file else where] = found.get(file[1] if file else where, 0) + number
    return found


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_does_not_log_reads_nothing(name):
    from gmt_tune.memory.simulation.recipe import measure

    config, ranks, reads, changes = RUNS[name]
    found = measure(config_of(config, log_every_n_steps=1000, **changes), ranks)
    if reads is not None:
        assert by_file(found.reads) == reads and not found.logging_reads
    assert found.peak > found.setup_peak and found.parts["activations and working memory"] > 0


@pytest.mark.parametrize(
    "name",
    ["single device", "optimizer in backward", "compact", "2 ranks", "preferences"],
)
def test_a_step_that_logs_reads_its_numbers_and_the_masks_once_each(name):
    from gmt_tune.memory.simulation.recipe import measure

    config, ranks, reads, changes = RUNS[name]
    found = measure(config_of(config, log_every_n_steps=1, **changes), ranks)
    assert by_file(found.reads) == reads
    assert by_file(found.logging_reads) == {"run/step_numbers.py": 1, "masking/host.py": 1}


def test_the_mask_launches_as_often_for_more_layers():
    """But for what PyTorch and torchtune launch for each tensor, which stays the same without a mask."""
    from gmt_tune.memory.simulation.recipe import measure

    launched = []
    for layers in (2, 4):
        for density in (0.2, 1.0):
            changes = dict(gradient_mask={"density": density}, model={**LLAMA, "num_layers": layers}, optimizer=ADAMW)
            launched.append(sum(measure(config_of(SINGLE, log_every_n_steps=1000, **changes)).launches.values()))
    assert launched[0] - launched[1] == launched[2] - launched[3] <= 30


@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("single device", 0.05),
        ("no activation checkpointing", 0.05),
        ("preferences", 0.05),
        # What a few layers of this size need at once is less than the most at real size
        ("optimizer in backward", 0.1),
    ],
)
def test_the_estimate_is_what_is_measured(name, within):
    from gmt_tune.memory import estimate
    from gmt_tune.memory.simulation.recipe import measure

    config, ranks, _, changes = RUNS[name]
    cfg = config_of(config, **changes)
    peak = measure(cfg, ranks).peak  # first: autograd, which the estimate runs, looks for devices once
    rows = estimate(cfg, ranks).rows
    estimated = sum(row.device_bytes for row in rows if row.name != "reserve")
    assert abs(estimated / peak - 1) <= within


def test_measuring_leaves_nothing_behind():
    from gmt_tune.memory.simulation.recipe import measure

    empty, is_available = torch.empty, torch.cuda.is_available()
    measure(config_of("quickstart"))
    assert torch.empty is empty and torch.cuda.is_available() == is_available
    assert not torch.distributed.is_initialized() and torch.zeros(2).tolist() == [0, 0]
