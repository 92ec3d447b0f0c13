"""What the mask costs a whole training step: tokens per second and peak memory, with and without it.

    python benchmarks/gpu_training.py                      Llama 3.2 1B in bf16 with random weights, on one GPU
    python benchmarks/gpu_training.py --model llama3_1_8b --optimizers AdamW8bit --batch-size 2
    python benchmarks/gpu_training.py --model tiny         a tiny one, to try the command out, on the CPU if need be
    python benchmarks/gpu_training.py --json result.json   the numbers in a file too

Each optimizer has a process of its own, in which steps without the mask come first and those with it follow.
``CompactAdamW`` has steps with its mask alone, of density 0.05, and is set beside the first of the others. It trains on
random tokens as the recipe does: torchtune's model, chunked loss and activation checkpointing. The first steps, in
which torchao's optimizers compile themselves, are not timed. Peak memory is that of CUDA's allocator; it is counted on
a GPU alone, and stands beside what `gmt-tune memory` says of the same settings, its reserve left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from gmt_tune import CompactAdamW, GradientMask

OPTIMIZERS = ("AdamW", "AdamW8bit", "AdamW4bit", "CompactAdamW")
COMPACT = {"density": 0.05, "refresh_every": 10}  # --warmup of so many steps gives each tensor its turn
# Builder, its arguments, and the config whose settings the estimate begins with
MODELS: dict[str, tuple[str, dict, str | None]] = {
    "smollm2_135m": ("gmt_tune.models.smollm2.smollm2_135m", {}, "smollm2/135M_gmt_single_device"),
    "llama3_2_1b": ("torchtune.models.llama3_2.llama3_2_1b", {}, "llama3_2/1B_gmt_single_device"),
    "llama3_1_8b": ("torchtune.models.llama3_1.llama3_1_8b", {}, "llama3_1/8B_gmt_single_device"),
    "tiny": (
        "torchtune.models.llama3_2.llama3_2",
        dict(
            vocab_size=256,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=64,
            intermediate_dim=128,
            max_seq_len=4096,
        ),
        None,
    ),
}


def build_model(name: str, device: torch.device):
    """With random bf16 weights, and layers that are computed twice rather than kept."""
    from torchtune import modules, training

    path, arguments, _ = MODELS[name]
    module, _, builder = path.rpartition(".")
    with training.set_default_dtype(torch.bfloat16), device:
        model = getattr(importlib.import_module(module), builder)(**arguments)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    return model


def build_optimizer(name: str, parameters) -> torch.optim.Optimizer:
    """As the configs have it: fused AdamW, or 8 or 4 bits with stochastic rounding."""
    if name == "AdamW":
        return torch.optim.AdamW(parameters, lr=2e-5, fused=True)
    if name == "CompactAdamW":
        return CompactAdamW(parameters, lr=2e-5, state_bits=8, bf16_stochastic_round=True)
    import torchao.optim

    return getattr(torchao.optim, name)(parameters, lr=2e-5, bf16_stochastic_round=True)


def measure(optimizer_name: str, args: argparse.Namespace) -> list[dict]:
    """The two lines of one optimizer: without a mask, and with it.

    Args:
        optimizer_name: one of ``OPTIMIZERS``.
        args: of the command line.

    Returns:
        For each ``seconds`` of each timed step, ``tokens_per_second`` (their median's), ``peak_gib`` (None on the CPU),
        and ``kept``, the fraction of entries that the mask kept in the last step (None without one).
    """
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    is_cuda = device.type == "cuda"
    torch.manual_seed(0)
    model = build_model(args.model, device)
    optimizer = build_optimizer(optimizer_name, model.parameters())
    loss_fn = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    vocab_size = model.tok_embeddings.weight.shape[0]
    tokens = torch.randint(vocab_size, (args.accumulation, args.batch_size, args.seq_len), device=device)
    lines = []
    own = {"density": args.density} if optimizer_name != "CompactAdamW" else COMPACT
    for policy in (None, own) if optimizer_name != "CompactAdamW" else (own,):
        mask = None
        if policy is not None:
            mask = GradientMask(model.named_parameters(), dense=["*norm*"], **policy)
            mask.register(optimizer)
        seconds = []
        for step in range(args.warmup + args.steps):
            if is_cuda:
                torch.cuda.synchronize(device)
                if step == args.warmup:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            for micro_batch in tokens:
                (loss_fn(model(micro_batch), micro_batch) / args.accumulation).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if is_cuda:
                torch.cuda.synchronize(device)
            if step >= args.warmup:
                seconds.append(time.perf_counter() - start)
        lines.append(
            {
                "optimizer": optimizer_name,
                "density": None if policy is None else policy["density"],
                "seconds": seconds,
                "tokens_per_second": tokens.numel() / statistics.median(seconds),
                "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if is_cuda else None,
                "kept": mask.metrics()["mask/density"] if mask is not None else None,
            }
        )
    return lines


def estimated_gib(config: str, overrides: list[str]) -> float | None:
    """What ``gmt-tune memory`` says of a config, without its reserve; None where it does not say."""
    command = [Path(sys.executable).parent / "gmt-tune", "memory", "--json", "--config", config, *overrides]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        print(f"no estimate: {process.stderr.strip()}", file=sys.stderr)
        return None
    return sum(row["device_bytes"] for row in json.loads(process.stdout)["rows"] if row["name"] != "reserve") / 2**30


def estimate_of(optimizer_name: str, args: argparse.Namespace) -> float | None:
    """Of the settings of this run; None for a model without a config."""
    config = MODELS[args.model][2]
    if config is None:
        return None
    settings = {
        "batch_size": args.batch_size,
        "tokenizer.max_seq_len": args.seq_len,
        "gradient_accumulation_steps": args.accumulation,
        "enable_activation_checkpointing": True,
        "optimizer._component_": ("torch" if optimizer_name == "AdamW" else "torchao") + f".optim.{optimizer_name}",
    }
    dropped = []
    if optimizer_name == "AdamW":
        settings["optimizer.fused"] = True
        dropped = ["~optimizer.bf16_stochastic_round"]
    elif optimizer_name == "CompactAdamW":
        settings["optimizer._component_"] = "gmt_tune.CompactAdamW"
        settings |= {"optimizer.state_bits": 8, **{f"gradient_mask.{key}": value for key, value in COMPACT.items()}}
    return estimated_gib(config, [f"{key}={value}" for key, value in settings.items()] + dropped)


def table(lines: list[dict]) -> str:
    """The measured lines as Markdown: the masked one of each optimizer beside the one without a mask."""
    rows = [
        "| optimizer | mask | tokens/s | against no mask | peak GiB | against no mask | estimated GiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    plain = {line["optimizer"]: line for line in lines if line["density"] is None}
    for line in lines:
        base = plain.get(line["optimizer"], lines[0])
        speed = f"{line['tokens_per_second'] / base['tokens_per_second'] - 1:+.1%}" if line is not base else ""
        peak = more = "not counted"
        if line["peak_gib"] is not None:
            peak, more = f"{line['peak_gib']:.2f}", f"{line['peak_gib'] - base['peak_gib']:+.2f}"
        more = more if line is not base else ""
        mask = "none" if line["density"] is None else f"density {line['density']:g}"
        estimate = f"{line['estimated_gib']:.2f}" if line.get("estimated_gib") else ""
        tokens = f"{line['tokens_per_second']:,.0f}"
        rows.append(f"| {line['optimizer']} | {mask} | {tokens} | {speed} | {peak} | {more} | {estimate} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llama3_2_1b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--threads", type=int, default=0, help="on the CPU; 0 leaves them as they are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    args = parser.parse_args(argv)

    lines = []
    for name in args.optimizers:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(measure, (name, args))
        estimate = estimate_of(name, args)
        lines += [{**line, "estimated_gib": estimate} for line in measured]
        speeds = ", ".join(f"{line['tokens_per_second']:,.0f}" for line in measured)
        print(f"{name}: {speeds} tokens/s", file=sys.stderr)
    is_cuda = torch.device(args.device).type == "cuda"
    hardware = torch.cuda.get_device_name(args.device) if is_cuda else f"CPU ({platform.machine()})"
    command = " ".join(["python benchmarks/gpu_training.py", *(sys.argv[1:] if argv is None else argv)])
    where = f"{args.model} in bf16, {args.accumulation} x {args.batch_size} x {args.seq_len} tokens a step, {hardware}"
    print(f"{where}, torch {torch.__version__}; median of {args.steps} steps; made by `{command}`\n\n{table(lines)}")
    if args.json:
        options = {key: value for key, value in vars(args).items() if key != "json"}
        setting = {"command": command, "hardware": hardware, "torch": torch.__version__, **options}
        text = json.dumps({"setting": setting, "lines": lines}, indent=1, default=str)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
