"""What a config takes at its real size, run as users run it: peak memory beside `gmt-tune memory`, and its speed.

    python benchmarks/recipe_memory.py llama3_1/8B_gmt_compact --limit-gib 22.5
    python benchmarks/recipe_memory.py llama3_1/8B_gmt_compact llama3_1/8B_gmt_low_memory --steps 4
    python benchmarks/recipe_memory.py smollm2/135M_gmt_single_device --beside-torchtune --override batch_size=16
    python benchmarks/recipe_memory.py llama3_1/8B_gmt_compact --tiny       a tiny model, on the CPU

The model has random weights, written once in the Hugging Face format; the data are letters, as many as fill each
sequence. Then `tune run` trains a few steps of each config and saves the model. Its log says what PyTorch's allocator
had at most. ``--limit-gib`` ends a run that would take more from the card than that: what a smaller card has.
``--beside-torchtune`` begins with the first config in torchtune's own recipe, which has no mask.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_training import estimated_gib
from selection import RESULTS, environment, save

from gmt_tune.cli.memory import load_config
from gmt_tune.errors import UserError

BIN = Path(sys.executable).parent
OURS, TORCHTUNES = "gmt_full_finetune", "full_finetune_single_device"
TINY = {
    "model._component_": "torchtune.models.llama3_1.llama3_1",
    **{"model.vocab_size": 384, "model.num_layers": 2, "model.num_heads": 4, "model.num_kv_heads": 2},
    **{"model.embed_dim": 64, "model.max_seq_len": 256, "model.intermediate_dim": 128},
    **{"tokenizer.max_seq_len": 128, "device": "cpu", "dtype": "fp32", "enable_activation_offloading": False},
    "log_peak_memory_stats": False,
}
# In place of torchao's, which take a CPU minutes to compile
TINY_OPTIMIZER = ["optimizer._component_=torch.optim.AdamW", "~optimizer.bf16_stochastic_round"]


def overrides_of(settings: dict[str, object]) -> list[str]:
    """As the command line takes them."""
    return [f"{key}={value}" for key, value in settings.items()]


def inputs_of(folder: Path) -> list[str]:
    """The overrides that read what ``write_model`` wrote."""
    return [
        f"checkpointer.checkpoint_dir={folder}",
        "checkpointer.checkpoint_files=[model.safetensors]",
        "tokenizer._component_=gmt_tune.models.chatml.ChatMLTokenizer",
        f"tokenizer.path={folder / 'tokenizer.json'}",
        *("dataset.source=json", f"dataset.data_files={folder / 'rows.jsonl'}"),
    ]


def write_model(folder: Path, overrides: list[str], config: str, device: str) -> list[str]:
    """A random model of a config, a tokenizer of single bytes, and data, in a folder; the overrides that read them."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from torchtune import training
    from torchtune.config import instantiate
    from torchtune.models.convert_weights import tune_to_hf

    cfg, _ = load_config(config, overrides)
    with training.set_default_dtype(torch.bfloat16), torch.device(device):
        model = instantiate(cfg.model)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    attention, width = model.layers[0].attn, model.tok_embeddings.embedding_dim
    sizes = {"num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads, "dim": width}
    weights = tune_to_hf(model.state_dict(), **sizes)
    save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    hf = {"hidden_size": width, "num_attention_heads": attention.num_heads, "model_type": "llama"}
    hf |= {"num_key_value_heads": attention.num_kv_heads, "vocab_size": model.tok_embeddings.num_embeddings}
    positions = attention.pos_embeddings
    hf |= {"rope_theta": positions.base, "tie_word_embeddings": hasattr(model.output, "tied_module")}
    if hasattr(positions, "scale_factor"):
        factors = {"factor": positions.scale_factor, "original_max_position_embeddings": positions.old_context_len}
        factors |= {"low_freq_factor": positions.low_freq_factor, "high_freq_factor": positions.high_freq_factor}
        hf["rope_scaling"] = {"rope_type": "llama3", **factors}
    (folder / "config.json").write_text(json.dumps(hf))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, ends = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=ends, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(1000):
        letters = "".join(map(chr, torch.randint(97, 123, (cfg.tokenizer.max_seq_len,), generator=generator).tolist()))
        row = {"instruction": "Write letters.", "input": "", "output": letters}  # Alpaca's columns, and GSM8K's
        rows.append(json.dumps({**row, "question": row["instruction"], "answer": letters}))
    (folder / "rows.jsonl").write_text("\n".join(rows))  # last: where it is, all is
    return inputs_of(folder)


def run(config: str, overrides: list[str], output_dir: Path, limit_gib: float | None, recipe: str = OURS) -> dict:
    """One training run: the numbers of its log, or how it failed."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if limit_gib is not None:
        share = min(1, limit_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        variables["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.6f}"
    command = [str(BIN / "tune"), "run", recipe, "--config", config, *overrides]
    start = time.monotonic()
    command.append(f"output_dir={output_dir}")
    process = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(process.stdout[-4000:], file=sys.stderr)
    row = {"config": config, "recipe": recipe, "status": process.returncode}
    row["seconds"] = round(time.monotonic() - start, 1)
    logs = "".join(file.read_text() for file in sorted(output_dir.glob("logs/*")))
    numbers: dict[str, list[float]] = {}
    for key, value in re.findall(r"([\w/]+):([-+.\deE]+)", logs):
        numbers.setdefault(key, []).append(float(value))
    row["steps"] = len(numbers.get("loss", []))
    row["loss"] = numbers.get("loss", [])
    row["tokens_per_second"] = statistics.median(numbers.get("tokens_per_second_per_gpu", [0.0])[1:] or [0.0])
    for name in ("active", "alloc", "reserved"):
        found = numbers.get(f"peak_memory_{name}")
        row[f"{name}_gib"] = max(found) if found else None
    row["saved_gib"] = sum(f.stat().st_size for f in output_dir.glob("epoch_*/*.safetensors")) / 2**30
    return row


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| config | steps | tokens/s | peak, GiB | with what it kept for later | `gmt-tune memory` | limit | run |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    for row in rows:
        memory = " | ".join(number(row[key]) for key in ("alloc_gib", "reserved_gib", "estimated_gib", "limit_gib"))
        done = "done" if row["status"] == 0 else f"exit status {row['status']}"
        config = row["config"] + (", torchtune's recipe" if row.get("recipe") == TORCHTUNES else "")
        lines.append(f"| {config} | {row['steps']} | {row['tokens_per_second']:,.0f} | {memory} | {done} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", nargs="+", help="of models of one size: the first one's is written")
    parser.add_argument("--steps", type=int, default=22, help="optimizer steps; compact states are whole after 20")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step, where it may be above 1")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="of all configs")
    parser.add_argument("--beside-torchtune", action="store_true", help="first, the first one in torchtune's recipe")
    parser.add_argument("--limit-gib", type=float, help="the most that a run may take from the card")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--folder", type=Path, help="for the model and what is saved; default: a temporary one")
    parser.add_argument("--model-folder", type=Path, help="keep the model there, and read it if it is there already")
    parser.add_argument("--json", type=Path, help="where to write the numbers; default: benchmarks/results/")
    args = parser.parse_args(argv)
    if args.limit_gib is not None and args.tiny:
        parser.error("--limit-gib limits a GPU, and --tiny runs on the CPU: leave one of them out")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this PyTorch sees no GPU: --tiny tries the command out on the CPU")
    given = overrides_of(TINY) if args.tiny else []
    given += args.override
    device = "cpu" if args.tiny else "cuda"
    runs = [(TORCHTUNES, args.configs[0])] if args.beside_torchtune else []
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = args.model_folder or Path(scratch)
        if (folder / "rows.jsonl").is_file():
            inputs = inputs_of(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                inputs = write_model(folder, given, args.configs[0], device)
            except UserError as error:
                parser.error(str(error))
        for recipe, config in [*runs, *((OURS, config) for config in args.configs)]:
            own = [*given, f"max_steps_per_epoch={args.steps}", "epochs=1"]
            if "low_memory" not in config:
                own.append(f"gradient_accumulation_steps={args.accumulation}")
            if args.tiny and load_config(config, [])[0].optimizer._component_.startswith("torchao"):
                own += TINY_OPTIMIZER
            with tempfile.TemporaryDirectory(dir=args.folder) as output:
                row = run(config, [*inputs, *own], Path(output), args.limit_gib, recipe)
            rows.append(row | {"limit_gib": args.limit_gib, "estimated_gib": estimated_gib(config, own)})
            print(f"{config}: {row}", file=sys.stderr, flush=True)
    print(table(rows))
    path = args.json or RESULTS / f"recipe_memory_{device}.json"
    save(path, {"environment": environment(torch.device(device)), "rows": rows})
    return max(row["status"] != 0 for row in rows)


if __name__ == "__main__":
    sys.exit(main())
