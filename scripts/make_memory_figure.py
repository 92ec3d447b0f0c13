"""Draws docs/images/compact_memory.svg: the memory of a training step by part, compact beside dense.

    python scripts/make_memory_figure.py [--output docs/images/compact_memory.svg]

The numbers are those of the table in docs/compact.md, which `gmt-tune memory --config ... --beside ...` prints. Needs
matplotlib.
"""

import argparse
from pathlib import Path

from make_configs import BESIDE, GIB, ROOT

OUTPUT = ROOT / "docs" / "images" / "compact_memory.svg"
CARDS_GB = (24, 48)  # drawn as lines
COLORS = {
    "weights": "#b8bec6",
    "gradients": "#c4601d",
    "due gradients": "#e8a06c",
    "optimizer states": "#1f5fa8",
    "gradient mask": "#17803e",
    "activations": "#8e3fc0",
    "working memory": "#8a6a08",
    "reserve": "#e3e5ea",
}


def read_parts() -> dict[str, dict[str, float]]:
    """GiB of each part, by config."""
    from gmt_tune.cli.memory import report

    reports = [report(name, None, BESIDE[2]) for name in BESIDE[:2]]
    return {r["config"]: {row["name"]: row["device_bytes"] / GIB for row in r["rows"]} for r in reports}


def label(gib: float) -> str:
    """A number as the bars and the table show it."""
    return f"{gib:.2f}"


def draw(parts: dict[str, dict[str, float]], output: Path) -> None:
    """One bar for each config, stacked by part."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "gmt-tune", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(8.4, 2.8), layout="constrained", facecolor="white")
    axes = figure.subplots()
    left = dict.fromkeys(parts, 0.0)
    for part, color in COLORS.items():
        widths = [of_config.get(part, 0.0) for of_config in parts.values()]
        axes.barh(list(parts), widths, left=list(left.values()), color=color, label=part, height=0.6)
        for row, (config, width) in enumerate(zip(parts, widths, strict=True)):
            if width > 3:  # wide enough for its number
                ink = "black" if color in (COLORS["weights"], COLORS["reserve"], COLORS["due gradients"]) else "white"
                axes.text(left[config] + width / 2, row, f"{width:.1f}", ha="center", va="center", color=ink)
            left[config] += width
    for row, total in enumerate(left.values()):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line of a card
        axes.text(total + 0.4, row, f"{label(total)} GiB", va="center", weight="bold", bbox=box)
    for card in CARDS_GB:
        axes.axvline(card, color="#6b727b", linestyle="--", linewidth=1)
        axes.text(card - 0.4, -0.5, f"{card} GB card", ha="right", va="bottom", color="#6b727b")
    axes.invert_yaxis()
    axes.set(xlabel="GiB on the device, estimated: 1 sequence of 2048 tokens", xlim=(0, 1.15 * max(left.values())))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None, "Creator": "scripts/make_memory_figure.py"})


def main() -> None:
    """Estimate and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    parts = read_parts()
    unknown = {part for of_config in parts.values() for part in of_config} - set(COLORS)
    if unknown:
        raise SystemExit(f"COLORS has no color for {', '.join(sorted(unknown))}")
    draw(parts, args.output)
    print(f"{args.output}: " + ", ".join(f"{name} {label(sum(p.values()))} GiB" for name, p in parts.items()))


if __name__ == "__main__":
    main()
