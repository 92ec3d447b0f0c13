"""What the mask and compact steps cost where nobody has measured them: bytes, launches, collectives and times on paper.

    python benchmarks/paper_estimate.py            prints the tables of docs/performance.md
    python benchmarks/paper_estimate.py --write    puts them there

Bytes and launches are counted from the code: the functions below say of which part of it. Times follow from few
measured numbers, which are read from ``results/gpu_h200.jsonl``: the share of a data sheet's bandwidth that a copy has,
how many entries the counting kernel takes in a second, and what share of a data sheet's arithmetic a training step has.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from selection import MODELS, RESULTS, llama_shapes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
MARKS = "<!-- python benchmarks/paper_estimate.py -->\n", "<!-- end -->\n"
SHAPES = MODELS | {"llama3_1_70b": llama_shapes(128256, 8192, 1024, 28672, layers=80, tied=False)}


def _found(file: str, part: str):
    """What a part of ``gpu.sh`` found on a device."""
    lines = map(json.loads, (RESULTS / file).read_text().splitlines())
    return next(line["found"] for line in lines if line["part"] == part)


# ------------------------------------------------------------------ measured, most of it on an H200

_LAUNCHES = {(row["model"], row["mode"]): row for row in _found("gpu_h200.jsonl", "launches")}
_ENTRIES_8B = sum(math.prod(shape) for shape in MODELS["llama3_1_8b"].values())
BANDWIDTH_SHARE = _found("gpu_h200.jsonl", "device")[0]["copy_gb_per_s"] / 4800
# bf16 entries a ns that the counting kernel takes: integer arithmetic bounds it, which an H100 has as much of
COUNTED_PER_NS = _ENTRIES_8B / (_LAUNCHES["llama3_1_8b", "magnitude"]["kernels"]["_count_kernel"][1] * 1e6)
SAMPLE_MS = _LAUNCHES["llama3_1_8b", "magnitude"]["kernels"]["_sample_kernel"][1]
_PLAIN = _found("gpu_h200.jsonl", "training of 8b, 8-bit")["lines"][0]
FLOPS_SHARE = 8 * _ENTRIES_8B * _PLAIN["tokens_per_second"] / 989e12  # with activation checkpointing, so 8 a parameter
# Of Python's work for each tensor; of DTensors from a mesh of one rank, which were searched as whole tensors are
HOST_US_MASK = _LAUNCHES["llama3_1_8b", "magnitude"]["host_ms"] * 1e3 / len(MODELS["llama3_1_8b"])
HOST_US_SHARDED = _found("gpu_h200.jsonl", "sharded")[0]["sharded_ms"] * 1e3 / len(MODELS["smollm2_135m"])
_COMPACT = {row["method"]: row["median_ms"] for row in _found("gpu_h100.jsonl", "compact steps of smollm2")["rows"]}
HOST_US_COMPACT = _COMPACT["compact, 8 bits"] * 1e3 / len(MODELS["smollm2_135m"])

# ------------------------------------------------------------------ assumed

LAUNCH_MS = 0.0025  # of a short kernel on the device
HOST_LAUNCH_MS = 0.006  # of the host, of launches beyond those of a whole mask
ALL_REDUCE_MS = 0.05  # of some ten KB within a node
SECTOR = 16  # bf16 entries that memory gives together: 32 bytes
_LANES = 132 * 64 * 1.98  # integer operations a ns of an H100 or H200: SMs, lanes of each, GHz


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: of it.
        gb_per_s: of a copy, read and written.
        counted_per_ns: bf16 entries that the counting kernel takes, as far as integer arithmetic bounds it.
        tflop_per_s: of bf16 products with float32 sums, as the data sheet says.
    """

    name: str
    gb_per_s: float
    counted_per_ns: float = COUNTED_PER_NS
    tflop_per_s: float = 989

    @classmethod
    def of_data_sheet(cls, name: str, gb_per_s: float, lanes: float, tflop_per_s: float) -> Card:
        return cls(name, gb_per_s * BANDWIDTH_SHARE, COUNTED_PER_NS * lanes / _LANES, tflop_per_s)


H200 = Card.of_data_sheet("H200", 4800, _LANES, 989)
H100 = Card.of_data_sheet("H100", 3350, _LANES, 989)
RTX_4090 = Card.of_data_sheet("RTX 4090", 1008, 128 * 64 * 2.52, 165)
A10 = Card.of_data_sheet("A10", 600, 72 * 64 * 1.695, 125)


@dataclass(frozen=True)
class Work:
    """What one process does in a step, besides the forward and the backward pass.

    Attributes:
        moved: bytes that kernels read and write which memory bounds.
        counted: entries that the counting kernel reads, all times together.
        itemsize: bytes of an entry.
        least: bytes that any way of doing it must move.
        launches: of kernels and copies.
        all_reduces, sent: collectives, and the bytes that go into all of them.
        fixed_ms: on the device, whatever the size.
    """

    moved: float
    counted: float
    itemsize: int
    least: float
    launches: int
    all_reduces: int = 0
    sent: int = 0
    fixed_ms: float = 0

    @property
    def bytes(self) -> float:
        return self.moved + self.counted * self.itemsize

    def device_ms(self, card: Card) -> float:
        """Time of the kernels and collectives."""
        counting = max(self.counted * self.itemsize / card.gb_per_s, self.counted / card.counted_per_ns) / 1e6
        short = self.launches * LAUNCH_MS + self.all_reduces * ALL_REDUCE_MS + self.fixed_ms
        return self.moved / card.gb_per_s / 1e6 + counting + short

    def floor_ms(self, card: Card) -> float:
        return self.least / card.gb_per_s / 1e6


def mask_work(
    sizes: Mapping[str, int], *, itemsize: int, dense: str = "", ranks: int = 1, in_backward: bool = False
) -> Work:
    """A step of ``GradientMask`` by magnitude, with a new selection.

    Args:
        sizes: entries of each tensor, of all ranks, by name.
        itemsize: of a gradient's entry: 2 or 4.
        dense: name pattern of those that are not masked, only looked at.
        ranks: each holds its share of every tensor.
        in_backward: optimizers step in backward, so that each tensor is masked by itself.
    """
    masked, others = _split(sizes, dense)
    held = sum(masked.values()) / ranks
    applied = 2 * held * itemsize  # kernels/apply.py: one read and one write
    checked = sum(others.values()) / ranks * itemsize
    if ranks == 1:  # search/triton.py
        launched = 1 + math.ceil((15 if itemsize == 2 else 31) / 5)  # counts, of which most end at once
        # table 5, ranks, sample, zeros 2, values 3, flags, smallest 3, zeros, apply, copy of the flags
        launches = (19 + 2 * launched) * (len(masked) if in_backward else 1)
        launches += 12 * (len(others) if in_backward else bool(others))
        reads = 1 if itemsize == 2 else 4.5
        all_reduces = sent = 0
    else:  # search/digits.py: levels of 5 bits, all tensors' counts in one all-reduce each
        reads = levels = math.ceil((15 if itemsize == 2 else 31) / 5)
        per_cat = math.ceil(len(masked) / 128)  # tensors that one launch joins
        launches = 31 + 33 * levels + len(masked) + 2 * len(others) + (2 * levels + 2) * (per_cat - 1)
        all_reduces = levels + bool(others)
        # int32 counts, and at the first level a flag; int64 flags of what is dense
        sent = 4 * len(masked) * (32 * levels + 1) + 8 * len(others)
    # The samples of all tensors are about two waves of programs, that of one tensor is one
    samples_ms = 0.0 if ranks > 1 else SAMPLE_MS / 2 * len(masked) if in_backward else SAMPLE_MS
    least = 3 * held * itemsize
    return Work(applied + checked, reads * held, itemsize, least, launches, all_reduces, sent, samples_ms)


def compact_work(
    sizes: Mapping[str, int], density: float, refresh_every: int, *, micro_batches: int, dense: str = "*norm*"
) -> Work:
    """A mean step of ``CompactAdamW`` with 8-bit moments and clipping, bf16, on one process.

    What is selected is read in sectors: of density d, 1 - (1 - d)^16 of all, where the places are by chance.
    """
    masked, others = _split(sizes, dense)
    entries, selected = sum(masked.values()), density * sum(masked.values())
    sectors = 2 * entries * (1 - (1 - density) ** SECTOR)  # bytes
    places = min(2 * selected, entries / 8)
    waiting = 1 - 1 / refresh_every  # share of the entries that are not due
    # kernels/gather.py, in the hooks: whole gradients are read to look for NaN, then what is selected
    hooks = micro_batches * waiting * (2 * entries + sectors + places + 4 * selected)
    # place.py reads what is due twice; gather.py and carry.py what is selected: gradient, moments and age
    turns = (1 - waiting) * (2 * 2 * entries + sectors + 2 * places + 12 * selected)
    # compact_adamw.py: scaled, its norm taken and clipped
    clipping = (4 + 2 + 4) * selected
    # kernels/update.py: gradient, two moments, age, places, and weights
    update = (2 + 2 * 2 + 2 * 2) * selected + places + 2 * sectors
    launches = 2 * _gathers(masked) * micro_batches  # a table and a kernel each
    launches += len(others) + 25  # dense gradients are scaled one by one; all else, and norms, is for many tensors
    launches += 2 * math.ceil(selected / (320 << 16))  # of a norm, and of what scales, for so many entries each
    launches += 45  # turns of what is due, and updates
    return Work(
        hooks + turns + clipping + update,
        entries / refresh_every,
        2,
        micro_batches * 2 * entries + update,
        launches,
        fixed_ms=SAMPLE_MS,
    )


def _split(sizes: Mapping[str, int], dense: str) -> tuple[dict[str, int], dict[str, int]]:
    masked = {name: size for name, size in sizes.items() if not fnmatch.fnmatch(name, dense)}
    return masked, {name: size for name, size in sizes.items() if name not in masked}


def _gathers(sizes: Mapping[str, int]) -> int:
    """Launches of a backward pass: gradients wait until they are more than 32 MiB (``by_kernels.Waiting``)."""
    launches = waiting = 0
    for size in reversed(sizes.values()):
        waiting += 2 * size
        if waiting > 1 << 25:
            launches, waiting = launches + 1, 0
    return launches + (waiting > 0)


def step_ms(entries: float, tokens: int, card: Card, checkpointing: bool) -> float:
    """A training step without the mask, of so many tokens on each rank, as if ranks never waited for each other."""
    return (8 if checkpointing else 6) * entries * tokens / (FLOPS_SHARE * card.tflop_per_s * 1e12) * 1e3


# ------------------------------------------------------------------ tables


def _sizes(model: str) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in SHAPES[model].items()}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(head: str, rows: list[list[str]]) -> str:
    columns = head.split(" | ")
    lines = [f"| {head} |", "|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def beside_measured() -> str:
    """The estimates of what was measured."""
    whole, smollm2 = _sizes("llama3_1_8b"), _sizes("smollm2_135m")
    quarter = {name: size for name, size in whole.items() if name.split(".")[0] in map(str, range(9))}
    selected = {row["method"]: row["median_ms"] for row in _found("gpu_h200.jsonl", "selection of 8b, fp32")["rows"]}
    measured_quarter = _found("gpu_h200.jsonl", "sharded")[1]["whole_ms"]
    run = _found("gpu_h100.jsonl", "8b on a card of 24 gb")["rows"][0]
    tokens = 2 * 2048
    compact = compact_work(whole, 0.05, 20, micro_batches=2).device_ms(H100)
    rows = []
    for label, model, sizes in (("Llama 3.1 8B", "llama3_1_8b", whole), ("SmolLM2-135M", "smollm2_135m", smollm2)):
        work, found = mask_work(sizes, itemsize=2), _LAUNCHES[model, "magnitude"]
        rows.append([f"mask, {label}, bf16, H200: device ms", work.device_ms(H200), found["device_ms"]])
        rows.append([f"mask, {label}, bf16: launches", work.launches, found["launches"]])
    rows.append(["mask, a quarter of 8B, bf16, H200: ms", mask_work(quarter, itemsize=2), measured_quarter])
    rows.append(["mask, 8B, fp32, H200: ms", mask_work(whole, itemsize=4), selected["gmt-tune"]])
    rows[-1][1], rows[-2][1] = (row[1].device_ms(H200) for row in (rows[-1], rows[-2]))
    estimated = step_ms(sum(whole.values()), tokens, H100, True) + compact
    rows.append(["`llama3_1/8B_gmt_compact`, 2 x 2,048 tokens, H100: ms of a whole step", estimated])
    rows[-1].append(tokens / run["tokens_per_second"] * 1e3)
    return _markdown(
        "what | estimate | measured", [[label, _number(paper), _number(found)] for label, paper, found in rows]
    )


def of_configs() -> str:
    """Steps of shipped configs."""
    rows = []
    for config, model, ranks, card in (
        ("llama3_1/8B_gmt_single_device", "llama3_1_8b", 1, H100),
        ("llama3_1/8B_gmt_low_memory", "llama3_1_8b", 1, H100),
        ("llama3_1/8B_gmt", "llama3_1_8b", 4, H100),
        ("llama3_1/70B_gmt", "llama3_1_70b", 8, H100),
        ("llama3_1/8B_gmt", "llama3_1_8b", 4, RTX_4090),
        ("llama3_1/8B_gmt_compact", "llama3_1_8b", 1, H100),
        ("llama3_1/8B_gmt_compact", "llama3_1_8b", 1, RTX_4090),
        ("llama3_1/8B_gmt_compact", "llama3_1_8b", 1, A10),
    ):
        cfg = yaml.safe_load((ROOT / "configs" / f"{config}.yaml").read_text(encoding="utf-8"))
        micro_batches, mask = cfg["gradient_accumulation_steps"], cfg["gradient_mask"]
        sizes = _sizes(model)
        if "compact" in config:
            work = compact_work(sizes, mask["density"], mask["refresh_every"], micro_batches=micro_batches)
            host_us = HOST_US_COMPACT
        else:
            in_backward = cfg["optimizer_in_bwd"]
            work = mask_work(sizes, itemsize=2, dense=mask["dense"][0], ranks=ranks, in_backward=in_backward)
            host_us = HOST_US_MASK if ranks == 1 else HOST_US_SHARDED
        tokens = cfg["batch_size"] * micro_batches * cfg["tokenizer"]["max_seq_len"]
        step = step_ms(sum(sizes.values()), tokens, card, cfg["enable_activation_checkpointing"])
        device, host = work.device_ms(card), len(sizes) * host_us / 1e3
        host += work.launches * HOST_LAUNCH_MS if ranks > 1 or cfg["optimizer_in_bwd"] else 0
        cells = [f"`{config}`, {ranks} x {card.name}", f"{work.bytes / 1e9:.1f}", f"{work.launches:,}"]
        cells.append(f"{work.all_reduces}, {work.sent / 1e3:,.0f} KB" if ranks > 1 else "none")
        cells += [_number(work.floor_ms(card)), _number(device), _number(host), _number(step)]
        rows.append([*cells, f"{device / (step + device):.1%}"])
    head = (
        "config and cards | GB moved | launches | all-reduces | floor, ms | device, ms | host, ms | training step, ms"
    )
    return _markdown(f"{head} | share of the step", rows)


def of_growth() -> str:
    """How the cost on an H100 grows with parameters, ranks and density."""
    rows = []

    def add(label: str, mask: Work | None, compact: Work | None) -> None:
        cells = [label]
        for work in (mask, compact):
            cells += [_number(work.device_ms(H100)), f"{work.launches:,}"] if work else ["", ""]
        rows.append([*cells, f"{mask.sent / 1e3:,.0f}" if mask and mask.sent else ""])

    for label, model in (("1B", "llama3_2_1b"), ("8B", "llama3_1_8b"), ("70B", "llama3_1_70b")):
        sizes = _sizes(model)
        works = mask_work(sizes, itemsize=2, dense="*norm*"), compact_work(sizes, 0.05, 20, micro_batches=1)
        add(f"{label} on one rank", *works)
    for model, label, ranks in (("llama3_1_8b", "8B", (2, 8, 64)), ("llama3_1_70b", "70B", (8, 64))):
        for n in ranks:
            add(f"{label} on {n} ranks", mask_work(_sizes(model), itemsize=2, dense="*norm*", ranks=n), None)
    for density in (0.01, 0.1, 0.2):
        add(f"8B, density {density:g}", None, compact_work(_sizes("llama3_1_8b"), density, 20, micro_batches=1))
    head = "what | mask: device, ms | launches | compact, density 0.05, one micro-batch: device, ms | launches"
    return _markdown(f"{head} | KB in all-reduces", rows)


def grounds() -> str:
    """The numbers that times follow from."""
    rows = [
        ["bandwidth of a copy, of the data sheet's", f"{BANDWIDTH_SHARE:.0%}", "H200"],
        ["arithmetic of a training step with AdamW8bit, of the data sheet's", f"{FLOPS_SHARE:.0%}", "H200, 8B"],
        ["bf16 entries that the counting kernel takes, at most, a second", f"{COUNTED_PER_NS * 1e9:.3g}", "H200, 8B"],
        ["host: a tensor's masking, microseconds", f"{HOST_US_MASK:.0f}", "H200's, 8B"],
        ["host: a DTensor's masking, microseconds", f"{HOST_US_SHARDED:.0f}", "H200's, SmolLM2"],
        ["host: a tensor's compact step, microseconds", f"{HOST_US_COMPACT:.0f}", "H100's, SmolLM2"],
        ["a short kernel on the device, microseconds", f"{LAUNCH_MS * 1e3:g}", "assumed"],
        ["a launch by the host, microseconds", f"{HOST_LAUNCH_MS * 1e3:g}", "assumed"],
        ["an all-reduce of some ten KB, microseconds", f"{ALL_REDUCE_MS * 1e3:g}", "assumed"],
    ]
    cards = ", ".join(f"{card.name} {card.gb_per_s / BANDWIDTH_SHARE:,.0f}" for card in (H100, H200, RTX_4090, A10))
    rows.append(["data sheets: memory, GB/s", cards, ""])
    cards = ", ".join(f"{card.name} {card.tflop_per_s:g}" for card in (H100, H200, RTX_4090, A10))
    rows.append(["data sheets: bf16 products, TFLOP/s", cards, ""])
    return _markdown("number | value | from", rows)


def page() -> str:
    """All tables."""
    return "\n\n".join(
        [
            "The numbers that times follow from:",
            grounds(),
            "Where both exist, the estimate beside what was measured. The first row and the last use numbers above "
            "that come from\nruns of the same model. What is not device time holds the wait for the first launch too.",
            beside_measured(),
            "A step of shipped configs, on each rank:",
            of_configs(),
            "How it grows: one rank of H100s, bf16, and for `CompactAdamW` one micro-batch:",
            of_growth(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    if not args.write:
        print(page())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    if not rest:
        sys.exit(f"{PAGE} lacks the line {MARKS[0].strip()}")
    _, _, behind = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n{page()}\n\n{MARKS[1]}{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
