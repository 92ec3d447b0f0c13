"""Writes the configs of all model families, and the tables of docs/configs.md, docs/compact.md and README.md.

    python scripts/make_configs.py          # writes the configs and the tables
    python scripts/make_configs.py --check  # writes nothing; exits with 1 if a file differs

A config is a whole file that users copy and change; here is what sets each of them apart, in released_models.py the
models, in config_template.py what the files share. The memory in their first lines is what `gmt-tune memory` says.
"""

import argparse
import functools
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import released_models as models
from config_template import Config, render
from released_models import Model

ROOT = Path(__file__).resolve().parents[1]
DOCS, README = ROOT / "docs" / "configs.md", ROOT / "README.md"
TABLE = ("<!-- gmt-tune memory --all -->\n", "<!-- end -->\n")
SIMULATED_TABLE = ("<!-- benchmarks/results/simulated_memory.json -->\n", "<!-- end -->\n")
CARD_TABLE = ("<!-- gmt-tune memory --all --by-card -->\n", "<!-- end -->\n")
SIMULATED = ROOT / "benchmarks" / "results" / "simulated_memory.json"
COMPACT_DOCS = ROOT / "docs" / "compact.md"
BESIDE = (
    "llama3_1/8B_gmt_compact",
    "llama3_1/8B_gmt_single_device",
    [
        "batch_size=1",
        "enable_activation_offloading=True",
        "loss._component_=gmt_tune.models.losses.LinearCrossEntropyLoss",
    ],
)
BESIDE_TABLE = (
    f"<!-- gmt-tune memory --config {BESIDE[0]} --beside {BESIDE[1]} {' '.join(BESIDE[2])} -->\n",
    "<!-- end -->\n",
)
GIB = 2**30


def _multi(model: Model, card: str, **more) -> Config:
    options = {"devices": 4, "optimizer": "AdamW", "accumulation": 1, **more}
    nodes = f"{options['nodes']} nodes of " if "nodes" in options else ""
    return Config(model, f"on {nodes}{options['devices']} cards", card, **options)


def _single(model: Model, card: str, **more) -> Config:
    return Config(model, f"on one {card} card", card, **more)


def _low(model: Model, card: str, **more) -> Config:
    options = {"in_backward": True, "offloading": True, "batch_size": 1, "accumulation": 1, **more}
    where = f"on {options['devices']} cards of {card}" if "devices" in options else f"on one {card} card"
    return Config(model, f"{where}, in little memory", card, **options)


def _compact(model: Model, card: str, **more) -> Config:
    options = {"optimizer": "CompactAdamW", "density": "0.05", "refresh": "20", "clip": "1.0", "batch_size": 1, **more}
    where = f"on {options['devices']} cards of {card}" if "devices" in options else f"on one {card} card"
    return Config(
        model, f"{where}, with states of selected entries alone", card, offloading=True, notes=COMPACT, **options
    )


COMPACT = (
    "Gradients and optimizer states exist for the selected entries alone, and the other weights stand still "
    "(docs/compact.md). The memory is an estimate; that of Llama 3.1 8B agrees with a run on a GPU. "
    "The density, 0.1 or 0.05, leaves room on the card."
)
TP = {"tensor_parallel": True, "devices": 8}
PAPER = "The GMT paper (Li et al., AAAI 2025, arXiv 2406.15330) trains this model on this data."


def _instructions(source: str, rows: int, question: str) -> dict[str, str]:
    return {
        "_component_": "torchtune.datasets.instruct_dataset",
        "source": f"{source}  # {rows:,} rows",
        "split": "train",
        "column_map": f"\n    input: {question}\n    output: response",
        "train_on_input": "False",
    }


MAGICODER = Config(
    models.MISTRAL_7B, "for code, on Magicoder-Evol-Instruct-110K", "24 GB", devices=8, optimizer="AdamW", batch_size=4,
    accumulation=4, max_seq_len=1024, epochs=2, warmup=52, decay="0.0", dense="[]",
    notes=PAPER + " Length and epochs are those that the authors of the data trained with; learning rate, batch (128), "
    "schedule and density are ours.",
    dataset=_instructions("ise-uiuc/Magicoder-Evol-Instruct-110K", 111_183, "instruction"),
)  # fmt: skip
METAMATH = Config(
    models.MISTRAL_7B, "for math, on MetaMathQA", "24 GB", devices=8, optimizer="AdamW", batch_size=4, accumulation=4,
    max_seq_len=512, epochs=3, warmup=278, decay="0.0", dense="[]",
    dataset=_instructions("meta-math/MetaMathQA", 395_000, "query"),
    notes=PAPER + " Learning rate, batch (128), epochs, cosine schedule with 3 % warm-up and no weight decay are those "
    "that the authors of the data published for Mistral 7B; prompt, length and density are ours.",
)  # fmt: skip
TULU = Config(
    models.LLAMA2_7B, "for general tasks, on the Tulu v2 mixture", "24 GB", devices=8, optimizer="AdamW", batch_size=2,
    accumulation=8, max_seq_len=2048, epochs=2, warmup=153, decay="0.0", dense="[]",
    notes=PAPER + " Learning rate, batch (128), epochs, 3 % warm-up, no weight decay and the prompt are those that the "
    "authors of the data published for Llama 2; cosine in place of their linear schedule, length and density are ours.",
    prompt=r"""
    system: ["<|system|>\n", "\n"]
    user: ["<|user|>\n", "\n<|assistant|>\n"]
    assistant: ["", "\n"]""",
    dataset={
        "_component_": "torchtune.datasets.chat_dataset",
        "source": "allenai/tulu-v2-sft-mixture  # 326,154 rows",
        "split": "train",
        "conversation_column": "messages",
        "conversation_style": "openai",
        "train_on_input": "False",
    },
)  # fmt: skip


def _ultrafeedback(pairs: int, split: str) -> dict[str, str]:
    return {
        "_component_": "torchtune.datasets.preference_dataset",
        "source": f"HuggingFaceH4/ultrafeedback_binarized  # {pairs:,} pairs",
        "split": split,
        "column_map": "  # Both hold whole conversations, lists of role and content\n"
        "    chosen: chosen\n    rejected: rejected",
        "train_on_input": "False",
    }


def _dpo(model: Model, card: str, **more) -> Config:
    options = {"devices": 8, "batch_size": 2, "accumulation": 4, **more}
    where = f"{options['devices']} cards" if options["devices"] > 1 else f"one {card} card"
    return Config(
        model, f"by DPO on {where}, on UltraFeedback", card, lr="5e-7", warmup=95, decay="0.0", preferences=True,
        dataset=_ultrafeedback(61_135, "train_prefs"),
        held_out=_ultrafeedback(2_000, "test_prefs"),
        notes="Learning rate, beta and batch (64 pairs) are usual ones for DPO at this size; nobody has tuned them for "
        "a mask. Updates this small would be rounded away in bf16 weights, so the optimizer rounds stochastically.",
        **options,
    )  # fmt: skip


CONFIGS = {
    "gemma2/2B_gmt": _multi(models.GEMMA2_2B, "24 GB"),
    "gemma2/2B_gmt_single_device": _single(models.GEMMA2_2B, "40 GB"),
    "gemma2/2B_gmt_low_memory": _low(models.GEMMA2_2B, "24 GB"),
    "gemma2/2B_gmt_compact": _compact(models.GEMMA2_2B, "16 GB", density="0.1"),
    "gemma2/9B_gmt": _multi(models.GEMMA2_9B, "40 GB"),
    "gemma2/9B_gmt_single_device": _single(models.GEMMA2_9B, "80 GB"),
    "gemma2/9B_gmt_low_memory": _low(models.GEMMA2_9B, "48 GB"),
    "gemma2/9B_gmt_compact": _compact(models.GEMMA2_9B, "40 GB", density="0.1"),
    "gemma2/9B_gmt_dpo": _dpo(models.GEMMA2_9B, "48 GB"),
    "gemma2/27B_gmt": _multi(models.GEMMA2_27B, "40 GB", optimizer="AdamW8bit", devices=8),
    "gemma2/27B_gmt_low_memory": _low(models.GEMMA2_27B, "24 GB", optimizer="AdamW4bit", devices=8),
    "gemma2/27B_gmt_compact": _compact(models.GEMMA2_27B, "80 GB"),
    "llama2/7B_gmt": _multi(models.LLAMA2_7B, "24 GB"),
    "llama2/7B_gmt_single_device": _single(models.LLAMA2_7B, "48 GB"),
    "llama2/7B_gmt_low_memory": _low(models.LLAMA2_7B, "40 GB"),
    "llama2/7B_gmt_compact": _compact(models.LLAMA2_7B, "24 GB", density="0.1"),
    "llama2/7B_gmt_tulu": TULU,
    "llama2/7B_gmt_dpo": _dpo(models.LLAMA2_7B_CHAT, "24 GB"),
    "llama2/13B_gmt": _multi(models.LLAMA2_13B, "40 GB"),
    "llama2/13B_gmt_single_device": _single(models.LLAMA2_13B, "80 GB", in_backward=True, accumulation=1),
    "llama2/13B_gmt_low_memory": _low(models.LLAMA2_13B, "48 GB", optimizer="AdamW4bit"),
    "llama2/13B_gmt_compact": _compact(models.LLAMA2_13B, "40 GB", density="0.1"),
    "llama2/13B_gmt_tulu": replace(TULU, model=models.LLAMA2_13B),
    "llama2/70B_gmt": _multi(models.LLAMA2_70B, "80 GB", optimizer="AdamW8bit", **TP),
    "llama3/8B_gmt": _multi(models.LLAMA3_8B, "40 GB"),
    "llama3/8B_gmt_single_device": _single(models.LLAMA3_8B, "80 GB"),
    "llama3/8B_gmt_low_memory": _low(models.LLAMA3_8B, "40 GB"),
    "llama3/8B_gmt_compact": _compact(models.LLAMA3_8B, "24 GB"),
    "llama3/8B_gmt_metamath": replace(
        METAMATH,
        model=models.LLAMA3_8B_BASE,
        lr="1e-5",
        notes=PAPER + " Batch (128), epochs, cosine schedule with 3 % warm-up and no weight decay are those that the "
        "authors of the data published for Mistral 7B; learning rate, length and density are ours.",
    ),
    "llama3/70B_gmt": _multi(models.LLAMA3_70B, "80 GB", optimizer="AdamW8bit", **TP),
    "llama3_1/8B_gmt": _multi(models.LLAMA3_1_8B, "40 GB"),
    "llama3_1/8B_gmt_single_device": _single(models.LLAMA3_1_8B, "80 GB"),
    "llama3_1/8B_gmt_low_memory": _low(models.LLAMA3_1_8B, "40 GB"),
    "llama3_1/8B_gmt_compact": _compact(models.LLAMA3_1_8B, "24 GB"),
    "llama3_1/8B_gmt_dpo": _dpo(models.LLAMA3_1_8B, "40 GB"),
    "llama3_1/8B_gmt_dpo_single_device": _dpo(models.LLAMA3_1_8B, "80 GB", devices=1, batch_size=1, accumulation=64),
    "llama3_1/70B_gmt": _multi(models.LLAMA3_1_70B, "80 GB", optimizer="AdamW8bit", **TP),
    "llama3_1/70B_gmt_low_memory": _low(models.LLAMA3_1_70B, "40 GB", optimizer="AdamW4bit", **TP),
    "llama3_1/70B_gmt_compact": _compact(models.LLAMA3_1_70B, "40 GB", **TP),
    "llama3_2/1B_gmt": _multi(models.LLAMA3_2_1B, "24 GB"),
    "llama3_2/1B_gmt_single_device": _single(models.LLAMA3_2_1B, "16 GB", batch_size=4, accumulation=4),
    "llama3_2/3B_gmt": _multi(models.LLAMA3_2_3B, "24 GB"),
    "llama3_2/3B_gmt_single_device": _single(models.LLAMA3_2_3B, "40 GB"),
    "llama3_2/3B_gmt_low_memory": _low(models.LLAMA3_2_3B, "24 GB"),
    "llama3_2/3B_gmt_compact": _compact(models.LLAMA3_2_3B, "16 GB", density="0.1"),
    "llama3_3/70B_gmt": _multi(models.LLAMA3_3_70B, "80 GB", optimizer="AdamW8bit", **TP),
    "llama3_3/70B_gmt_multinode": _multi(models.LLAMA3_3_70B, "80 GB", nodes=2, **TP),
    "mistral/7B_gmt": _multi(models.MISTRAL_7B, "24 GB"),
    "mistral/7B_gmt_single_device": _single(models.MISTRAL_7B, "48 GB"),
    "mistral/7B_gmt_low_memory": _low(models.MISTRAL_7B, "40 GB"),
    "mistral/7B_gmt_compact": _compact(models.MISTRAL_7B, "24 GB", density="0.1"),
    "mistral/7B_gmt_dpo": _dpo(models.MISTRAL_7B_INSTRUCT, "24 GB"),
    "mistral/7B_gmt_magicoder": MAGICODER,
    "mistral/7B_gmt_metamath": METAMATH,
    "mistral_v0_3/7B_gmt": _multi(models.MISTRAL_7B_V0_3, "24 GB"),
    "mistral_v0_3/7B_gmt_single_device": _single(models.MISTRAL_7B_V0_3, "48 GB"),
    "mistral_v0_3/7B_gmt_low_memory": _low(models.MISTRAL_7B_V0_3, "40 GB"),
    "mistral_v0_3/7B_gmt_compact": _compact(models.MISTRAL_7B_V0_3, "24 GB", density="0.1"),
    "mistral_v0_3/7B_gmt_dpo": _dpo(models.MISTRAL_7B_V0_3, "24 GB"),
    "phi4/14B_gmt": _multi(models.PHI4_14B, "40 GB"),
    "phi4/14B_gmt_single_device": _single(models.PHI4_14B, "80 GB", in_backward=True, accumulation=1),
    "phi4/14B_gmt_low_memory": _low(models.PHI4_14B, "40 GB", devices=2),
    "phi4/14B_gmt_compact": _compact(models.PHI4_14B, "40 GB"),
    "qwen2_5/0.5B_gmt": _multi(models.QWEN2_5_0_5B, "16 GB"),
    "qwen2_5/0.5B_gmt_single_device": _single(models.QWEN2_5_0_5B, "16 GB", batch_size=4, accumulation=4),
    "qwen2_5/1.5B_gmt": _multi(models.QWEN2_5_1_5B, "16 GB"),
    "qwen2_5/1.5B_gmt_single_device": _single(models.QWEN2_5_1_5B, "16 GB"),
    "qwen2_5/1.5B_gmt_low_memory": _low(models.QWEN2_5_1_5B, "16 GB"),
    "qwen2_5/1.5B_gmt_compact": _compact(models.QWEN2_5_1_5B, "16 GB", density="0.1"),
    "qwen2_5/3B_gmt": _multi(models.QWEN2_5_3B, "16 GB"),
    "qwen2_5/3B_gmt_single_device": _single(models.QWEN2_5_3B, "40 GB"),
    "qwen2_5/3B_gmt_low_memory": _low(models.QWEN2_5_3B, "16 GB"),
    "qwen2_5/3B_gmt_compact": _compact(models.QWEN2_5_3B, "16 GB", density="0.1"),
    "qwen2_5/7B_gmt": _multi(models.QWEN2_5_7B, "24 GB"),
    "qwen2_5/7B_gmt_single_device": _single(models.QWEN2_5_7B, "80 GB"),
    "qwen2_5/7B_gmt_low_memory": _low(models.QWEN2_5_7B, "40 GB"),
    "qwen2_5/7B_gmt_compact": _compact(models.QWEN2_5_7B, "24 GB"),
    "qwen2_5/7B_gmt_dpo": _dpo(models.QWEN2_5_7B, "40 GB"),
    "qwen2_5/14B_gmt": _multi(models.QWEN2_5_14B, "40 GB"),
    "qwen2_5/14B_gmt_single_device": _single(models.QWEN2_5_14B, "80 GB", in_backward=True, accumulation=1),
    "qwen2_5/14B_gmt_low_memory": _low(models.QWEN2_5_14B, "40 GB", devices=2),
    "qwen2_5/14B_gmt_compact": _compact(models.QWEN2_5_14B, "40 GB"),
    "qwen2_5/32B_gmt": _multi(models.QWEN2_5_32B, "40 GB", optimizer="AdamW8bit", **TP),
    "qwen2_5/32B_gmt_low_memory": _low(models.QWEN2_5_32B, "24 GB", optimizer="AdamW4bit", **TP),
    "qwen2_5/32B_gmt_compact": _compact(models.QWEN2_5_32B, "40 GB", devices=4),
    "qwen3/0.6B_gmt": _multi(models.QWEN3_0_6B, "16 GB"),
    "qwen3/0.6B_gmt_single_device": _single(models.QWEN3_0_6B, "16 GB", batch_size=4, accumulation=4),
    "qwen3/1.7B_gmt": _multi(models.QWEN3_1_7B, "16 GB"),
    "qwen3/1.7B_gmt_single_device": _single(models.QWEN3_1_7B, "16 GB"),
    "qwen3/1.7B_gmt_low_memory": _low(models.QWEN3_1_7B, "16 GB"),
    "qwen3/1.7B_gmt_compact": _compact(models.QWEN3_1_7B, "16 GB", density="0.1"),
    "qwen3/4B_gmt": _multi(models.QWEN3_4B, "16 GB"),
    "qwen3/4B_gmt_single_device": _single(models.QWEN3_4B, "40 GB"),
    "qwen3/4B_gmt_low_memory": _low(models.QWEN3_4B, "24 GB"),
    "qwen3/4B_gmt_compact": _compact(models.QWEN3_4B, "16 GB", density="0.1"),
    "qwen3/8B_gmt": _multi(models.QWEN3_8B, "24 GB"),
    "qwen3/8B_gmt_single_device": _single(models.QWEN3_8B, "80 GB"),
    "qwen3/8B_gmt_low_memory": _low(models.QWEN3_8B, "40 GB"),
    "qwen3/8B_gmt_compact": _compact(models.QWEN3_8B, "24 GB"),
    "qwen3/8B_gmt_dpo": _dpo(models.QWEN3_8B, "40 GB"),
    "qwen3/14B_gmt": _multi(models.QWEN3_14B, "40 GB"),
    "qwen3/14B_gmt_single_device": _single(models.QWEN3_14B, "80 GB", in_backward=True, accumulation=1),
    "qwen3/14B_gmt_low_memory": _low(models.QWEN3_14B, "40 GB", devices=2),
    "qwen3/14B_gmt_compact": _compact(models.QWEN3_14B, "40 GB"),
    "qwen3/32B_gmt": _multi(models.QWEN3_32B, "40 GB", optimizer="AdamW8bit", **TP),
    "qwen3/32B_gmt_low_memory": _low(models.QWEN3_32B, "24 GB", optimizer="AdamW4bit", **TP),
    "qwen3/32B_gmt_compact": _compact(models.QWEN3_32B, "40 GB", devices=4),
}


def _report(name: str, text: str) -> dict:
    """What `gmt-tune memory` finds of a config's text, whatever the text says of it."""
    return _report_of(without_memory(text)) | {"config": name}


def without_memory(text: str) -> str:
    """A config's text as :func:`render` gives it where its memory is not known."""
    return re.sub(r"^# Needs about .*$", "#", text, flags=re.MULTILINE)


@functools.cache
def _report_of(text: str) -> dict:
    from gmt_tune.cli import memory

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return memory.report(file.name, None, [])


def build(names: Iterable[str] = tuple(CONFIGS)) -> dict[str, str]:
    """Configs by name, with the memory in their first lines: counting it takes about a second for each.

    Raises:
        ValueError: if one does not fit on the card that it is meant for, or names a larger one than it needs.
    """
    texts = {}
    for name in names:
        c = CONFIGS[name]
        report = _report(name, render(name, c, ""))
        gib, host, cards = report["device_bytes"] / GIB, report["host_bytes"] / GIB, report["fits_on"]
        if c.card not in cards:
            raise ValueError(f"{name} needs {gib:.1f} GiB and does not fit on a {c.card} card")
        if c.card in c.purpose and c.card != cards[0]:
            raise ValueError(f"{name} says {c.card}, and needs no more than {cards[0]}")
        each = f" on each of {report['world_size']} cards" if report["world_size"] > 1 else ""
        on_host = f", and {host:.0f} GiB of the host's" if host > 1 else ""
        memory = f"Needs about {gib:.0f} GiB{each}{on_host}, says `gmt-tune memory`: fits cards of {cards[0]} or more."
        texts[name] = render(name, c, memory)
    return texts


def build_docs() -> dict[Path, str]:
    """docs/configs.md, docs/compact.md and README.md with new tables, of the configs as they are on disk.

    A file without the marks of its table stays as it is.
    """
    from gmt_tune.cli import memory
    from gmt_tune.integrations.torchtune.plugin.registry import config_paths

    reports = [_report(name, path.read_text(encoding="utf-8")) for name, path in config_paths().items()]
    simulated = json.loads(SIMULATED.read_text(encoding="utf-8"))
    both = [memory.report(name, None, BESIDE[2]) for name in BESIDE[:2]]
    made = {}
    for path, (begin, end), table in (
        (DOCS, TABLE, memory.markdown_table(reports)),
        (DOCS, SIMULATED_TABLE, memory.simulated_table(reports, simulated)),
        (README, CARD_TABLE, memory.card_table(reports)),
        (COMPACT_DOCS, BESIDE_TABLE, memory.beside_table(both)),
    ):
        text = made.get(path) or path.read_text(encoding="utf-8")
        before, mark, rest = text.partition(begin)
        made[path] = before + begin + table + "\n" + end + rest.partition(end)[2] if mark else text
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    check = parser.parse_args().check
    differing = []

    def put(path: Path, text: str) -> None:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            differing.append(path)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")

    for name, text in build().items():
        put(ROOT / "configs" / f"{name}.yaml", text)
    for path, text in build_docs().items():
        put(path, text)
    for path in differing:
        print(("differs: " if check else "wrote ") + str(path.relative_to(ROOT)))
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
