"""Full fine-tuning, GMT, GMT with a compact optimizer, and LoRA, side by side in a plain loop: two minutes on a CPU.

    pip install gmt-tune matplotlib
    python examples/side_by_side.py --output side_by_side.svg

The model and the task are the quickstart's, which come with the package: a Llama of 1.2 million parameters that has
read about the people of a village learns to answer questions about some of them, and is asked about the others. All see
the same batches. Of the learning rates that were tried with seed 0, each method has its best: 1e-3 and 2e-3 for full
fine-tuning and GMT, 1e-3 to 2e-2 for LoRA; 2e-3 alone for the compact optimizer. ``--lr METHOD=RATE`` tries another.
"""

import argparse
import logging
import math
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune import config, training
from torchtune.data import padded_collate_sft
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.data import ExactMatch, quickstart_dataset
from gmt_tune.integrations.torchtune.plugin.assets import register_resolver
from gmt_tune.integrations.torchtune.plugin.registry import config_paths
from gmt_tune.models import tiny

RATES = {"SFT": 2e-3, "GMT": 2e-3, "GMT compact": 2e-3, "LoRA": 5e-3}
COLORS = {"SFT": "#6b727b", "GMT": "#c4601d", "GMT compact": "#1f5fa8", "LoRA": "#3f8f4f"}
BATCH_SIZE, DENSITY, RANK = 32, 0.2, 16


def base_model(weights: dict) -> nn.Module:
    model = tiny.tiny_llama()
    model.load_state_dict(weights)
    return model


def with_lora(weights: dict) -> nn.Module:
    """The same model with adapters on all matrices, which alone are trained."""
    modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = tiny.lora_tiny_llama(modules, apply_lora_to_mlp=True, lora_rank=RANK, lora_alpha=2 * RANK)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("lora" in name for name in missing)
    set_trainable_params(model, get_adapter_params(model))
    return model


def set_up(method: str, weights: dict, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and the optimizer of a method. The mask acts inside the optimizer's step: the loop is the same."""
    model = with_lora(weights) if method == "LoRA" else base_model(weights)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer_class = CompactAdamW if method == "GMT compact" else torch.optim.AdamW
    optimizer = optimizer_class(trained, lr=lr, weight_decay=0.01)
    if method == "GMT":
        GradientMask(model.named_parameters(), density=DENSITY).register(optimizer)
    elif method == "GMT compact":
        GradientMask(model.named_parameters(), density=DENSITY, refresh_every=10).register(optimizer)
    return model, optimizer


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return torch.nn.functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), labels.flatten())


def train(method: str, lr: float, steps: int, asked: int, every: int, seed: int) -> dict:
    """Train, and measure on held-out questions every so many steps."""
    cfg = OmegaConf.load(config_paths()["quickstart"])
    tokenizer = config.instantiate(cfg.tokenizer)
    checkpointer = config.instantiate(cfg.checkpointer, should_load_recipe_state=False)
    torch.manual_seed(seed)
    weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
    model, optimizer = set_up(method, weights, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    rows, held_out = quickstart_dataset(tokenizer), quickstart_dataset(tokenizer, split="held_out")
    evaluate = ExactMatch(tokenizer, size=asked, max_new_tokens=12, batch_size=96, show=0)
    batches = [
        index.tolist()
        for epoch in range(math.ceil(steps * BATCH_SIZE / len(rows)))
        for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).split(BATCH_SIZE)
    ]

    def collated(indices, data) -> dict[str, torch.Tensor]:
        return padded_collate_sft([data[i] for i in indices], padding_idx=tokenizer.pad_id)

    result: dict = {"steps": [], "loss": [], "accuracy": []}

    def measure(step: int) -> None:
        with torch.no_grad():
            result["loss"].append(loss_of(model, collated(range(96), held_out)).item())
        result["steps"].append(step)
        result["accuracy"].append(evaluate(model)["accuracy"])

    measure(0)
    start = time.perf_counter()
    for step in range(steps):
        loss_of(model, collated(batches[step], rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            paused = time.perf_counter()
            measure(step + 1)
            start += time.perf_counter() - paused
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
    result["seconds"] = time.perf_counter() - start
    result["state"] = sum(v.numel() * v.element_size() for v in states)
    result["moved"] = moved(method, model, weights)
    return result


def moved(method: str, model: nn.Module, weights: dict) -> float:
    """The fraction of the model's entries that are not what they were. LoRA's adapters change whole matrices."""
    if method == "LoRA":
        adapted = [name.rpartition(".lora_a")[0] for name in get_adapter_params(model) if ".lora_a" in name]
        changed = sum(model.get_parameter(f"{name}.weight").numel() for name in adapted)
    else:
        changed = sum(int((p.detach() != weights[name]).sum()) for name, p in model.named_parameters())
    return changed / sum(weight.numel() for weight in weights.values())


def table(results: dict[str, dict]) -> str:
    rows = ["| method | held-out loss | accuracy, % | optimizer states, MB | entries moved, % | seconds |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    for method, r in results.items():
        rows.append(
            f"| {method} | {r['loss'][-1]:.3f} | {100 * r['accuracy'][-1]:.1f} | {r['state'] / 1e6:.2f} | "
            f"{100 * r['moved']:.0f} | {r['seconds']:.0f} |"
        )
    return "\n".join(rows)


def draw(results: dict[str, dict], output: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "gmt-tune", "svg.fonttype": "none", "font.size": 10})
    figure = Figure(figsize=(8.4, 3.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for method, r in results.items():
        style = {"color": COLORS[method], "marker": "o", "markersize": 3, "label": method}
        left.plot(r["steps"], r["loss"], **style)
        right.plot(r["steps"], [100 * value for value in r["accuracy"]], **style)
    left.set(title="loss on held-out questions", xlabel="optimizer step", yscale="log")
    right.set(title="held-out questions answered, %", xlabel="optimizer step", ylim=(-3, 103))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the figure, .svg or .png; without it, the table alone")
    parser.add_argument("--steps", type=int, default=81, help="27 are an epoch")
    parser.add_argument("--every", type=int, default=9, help="steps between two measurements")
    parser.add_argument("--asked", type=int, default=96, help="held-out questions that are asked, 288 at most")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data, and of the adapters")
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES), metavar="METHOD")
    parser.add_argument("--lr", nargs="+", default=[], metavar="METHOD=RATE", help="other learning rates")
    args = parser.parse_args(argv)
    register_resolver()
    logging.getLogger("torchtune.utils._logging").setLevel(logging.WARNING)
    rates = RATES | {method: float(rate) for method, rate in (item.split("=") for item in args.lr)}
    results = {}
    for method in args.methods:
        results[method] = train(method, rates[method], args.steps, args.asked, args.every, args.seed)
        print(f"{method}: accuracy {results[method]['accuracy'][-1]:.3f}", flush=True)
    print(table(results))
    if args.output is not None:
        draw(results, args.output)
        print(f"Wrote {args.output}")
    return results


if __name__ == "__main__":
    main()
