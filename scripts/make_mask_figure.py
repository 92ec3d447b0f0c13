"""Draws docs/images/how_gmt_works.svg from a real run: what the mask keeps of one gradient, and of all over time.

    python scripts/make_mask_figure.py [--steps 60] [--output docs/images/how_gmt_works.svg]

Trains the quickstart's model on its questions for a minute on a CPU, as the quickstart does: batches of 32, AdamW,
density 0.2, every tensor by itself. Needs matplotlib.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from gmt_tune import GradientMask
from gmt_tune.integrations.torchtune.plugin.assets import register_resolver
from gmt_tune.integrations.torchtune.plugin.registry import config_paths

ROOT = Path(__file__).resolve().parents[1]
DENSITY = 0.2
SHOWN = "layers.1.attn.q_proj.weight"
CORNER = 40  # rows and columns of the shown gradient


@dataclass
class Recording:
    """What the figure shows.

    Attributes:
        gradient, kept: the shown parameter's gradient at the last step, before and after the mask, [out, in].
        threshold: of the shown parameter at that step.
        overlap: fraction of a selection that was in the one before, for each step from the second on.
        coverage: fraction of all masked entries that were selected at least once, for each step.
    """

    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    kept: Tensor = field(default_factory=lambda: torch.empty(0))
    threshold: float = 0.0
    overlap: list[float] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)


def train(steps: int) -> Recording:
    """Fine-tune the quickstart's model and watch its gradients."""
    from torchtune import config, training
    from torchtune.data import padded_collate_sft

    torch.manual_seed(0)
    register_resolver()
    cfg = OmegaConf.load(config_paths()["quickstart"])
    tokenizer = config.instantiate(cfg.tokenizer)
    dataset = config.instantiate(cfg.dataset, tokenizer)
    checkpointer = config.instantiate(cfg.checkpointer, should_load_recipe_state=False)
    model = config.instantiate(cfg.model)
    model.load_state_dict(checkpointer.load_checkpoint()[training.MODEL_KEY])

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    mask = GradientMask(model.named_parameters(), density=DENSITY, dense=["*norm*"])
    seen = Recording()
    # Hooks run in the order in which they were registered: this one sees the gradient as it comes
    optimizer.register_step_pre_hook(
        lambda *_: setattr(seen, "gradient", dict(model.named_parameters())[SHOWN].grad.clone())
    )
    mask.register(optimizer)

    order = torch.randperm(len(dataset))
    before: dict[str, Tensor] = {}
    ever: dict[str, Tensor] = {}
    for step in range(steps):
        rows = [dataset[int(order[(step * 32 + i) % len(dataset)])] for i in range(32)]
        batch = padded_collate_sft(rows, padding_idx=tokenizer.pad_id)
        labels_BS = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        logits_BSV = model(batch["tokens"])
        torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten()).backward()
        optimizer.step()
        selected = {name: p.grad != 0 for name, p in mask.masked_parameters.items()}
        optimizer.zero_grad(set_to_none=False)
        if before:
            again = sum(int((selected[name] & before[name]).sum()) for name in selected)
            seen.overlap.append(again / sum(int(s.sum()) for s in selected.values()))
        ever = {name: s | ever.get(name, torch.zeros_like(s)) for name, s in selected.items()}
        seen.coverage.append(sum(int(e.sum()) for e in ever.values()) / sum(e.numel() for e in ever.values()))
        before = selected
        seen.kept = seen.gradient * selected[SHOWN]
        seen.threshold = float(mask.statistics.thresholds[SHOWN])
    return seen


def draw(seen: Recording, output: Path) -> None:
    """Four panels: the gradient, what is left of it, the distribution with its threshold, and the run over time."""
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "gmt-tune", "svg.fonttype": "none", "font.size": 9})
    blue, grey, orange = "#1f5fa8", "#b8bec6", "#c4601d"
    figure = Figure(figsize=(8.4, 6.6), layout="constrained", facecolor="white")
    (before, after), (distribution, time) = figure.subplots(2, 2)

    magnitude = seen.gradient.abs()
    low, high = (float(magnitude.quantile(q)) for q in (0.02, 0.999))
    scale = LogNorm(low, high)
    for axes, values, title in (
        (before, magnitude, "1. the accumulated gradient, by magnitude"),
        (after, torch.where(seen.kept != 0, magnitude, float("nan")), "2. what the optimizer sees: the largest 20 %"),
    ):
        image = axes.imshow(values[:CORNER, :CORNER].numpy(), norm=scale, cmap="Blues", interpolation="nearest")
        axes.set(title=title, xticks=[], yticks=[])
    figure.colorbar(image, ax=[before, after], shrink=0.9, label="|gradient|")

    logs = magnitude[magnitude > 0].log10().flatten()
    edges = torch.linspace(float(logs.quantile(0.002)), float(logs.max()), 60)
    threshold = torch.tensor(seen.threshold).log10()
    for part, color, label in (
        (logs[logs < threshold], grey, "zeroed"),
        (logs[logs >= threshold], blue, "kept"),
    ):
        distribution.hist(part.numpy(), bins=edges.tolist(), color=color, label=label)
    distribution.axvline(float(threshold), color=orange, label=f"T = {seen.threshold:.1e}")
    distribution.set(
        title="3. the threshold T: the k-th largest magnitude", xlabel="log10 |gradient|", ylabel="entries"
    )
    distribution.legend(frameon=False)

    steps = range(1, len(seen.coverage) + 1)
    time.plot(steps, seen.coverage, color=blue, label="ever selected")
    time.plot(list(steps)[1:], seen.overlap, color=orange, label="selected in the step before too")
    time.axhline(DENSITY, color=grey, linestyle="--")
    time.text(len(seen.coverage), DENSITY + 0.015, "density", color="#6b727b", ha="right")
    time.set(title="4. the selection follows the data", xlabel="optimizer step", ylabel="fraction", ylim=(0, 1))
    time.legend(frameon=False, loc="lower right")
    for axes in (distribution, time):
        axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None, "Creator": "scripts/make_mask_figure.py"})


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "how_gmt_works.svg")
    args = parser.parse_args()
    seen = train(args.steps)
    draw(seen, args.output)
    print(
        f"{args.output}: overlap {min(seen.overlap):.2f} to {max(seen.overlap):.2f}, "
        f"coverage after {args.steps} steps {seen.coverage[-1]:.2f}, after 1 step {seen.coverage[0]:.2f}"
    )


if __name__ == "__main__":
    main()
