"""``gmt-tune memory``: what a config will need on each device, before anything is downloaded or run.

The arithmetic, and where each formula comes from, is in ``gmt_tune.memory``.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict

from gmt_tune.cli.configs import add_arguments, check_world_size, devices_of_run_line, errors_of, read_config
from gmt_tune.errors import UserError

GIB = 2**30
# Parts of a step's memory: by what holds them, and all else
_HELD = ("weights", "reference model", "gradients", "optimizer states", "gradient mask")
_PASSING = "activations and working memory"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "memory",
        help="estimate the memory that a config needs",
        description="Estimate the memory of each device that a config needs, from the config alone: no weights, no "
        "network, no accelerator.",
        epilog="Example: gmt-tune memory --config llama3_1/8B_gmt --world-size 8 batch_size=4",
        usage="gmt-tune memory (--config NAME_OR_PATH [--beside NAME_OR_PATH | --measure] [--world-size N] | "
        "--all [--by-card]) [--json] [KEY=VALUE ...]",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="NAME_OR_PATH", help="a config's name, as `tune ls` shows it, or its file")
    which.add_argument("--all", action="store_true", help="print a Markdown table of all configs of this package")
    parser.add_argument(
        "--by-card", action="store_true", help="with --all: print which configs fit on which card, by model"
    )
    parser.add_argument(
        "--beside", metavar="NAME_OR_PATH", help="with --config: print a Markdown table of both configs, part by part"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="with --config: train the recipe for a few steps on a simulated GPU, too, and print its peak beside the "
        "estimate; takes minutes and PyTorch's build for CUDA, and no GPU",
    )
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, with bytes instead of GiB")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    check_world_size(args)
    if args.by_card and not args.all:
        raise UserError("--by-card is for all configs: give --all instead of --config")
    if args.beside is not None and args.all:
        raise UserError("--beside compares with one config: give --config instead of --all")
    if args.measure and (args.all or args.beside is not None):
        raise UserError("--measure is for one config: give --config, without --beside")
    if args.all:
        from gmt_tune.integrations.torchtune.plugin.registry import config_paths

        table = card_table if args.by_card else markdown_table
        reports = [report(name, args.world_size, args.overrides) for name in config_paths()]
        print(json.dumps(reports, indent=2) if args.json else table(reports))
        return 0
    if args.measure:
        _answer_without_driver(args.config, args.overrides)
    result = report(args.config, args.world_size, args.overrides)
    if args.beside is not None:
        both = [result, report(args.beside, args.world_size, args.overrides)]
        print(json.dumps(both, indent=2) if args.json else beside_table(both))
        return 0
    if args.measure:
        result["measured"] = measured(result, args.overrides)
    print(json.dumps(result, indent=2) if args.json else text_table(result))
    return 0


def _answer_without_driver(name: str, overrides: list[str]) -> None:
    """Before the estimate, which runs autograd: that looks for devices once in a process."""
    from gmt_tune.memory.simulation.driver import answer_without_driver

    cfg, _ = load_config(name, overrides)
    if not _is_gpu({"device": str(cfg.get("device", "cuda"))}):
        raise UserError(f"--measure simulates a GPU, and {name} runs on the CPU: add device=cuda")
    answer_without_driver()


def measured(report: dict, overrides: list[str]) -> dict:
    """What a simulated training step of a reported config takes, as plain data: bytes of the first device."""
    import torch

    from gmt_tune.memory.simulation.recipe import measure

    cfg, _ = load_config(report["config"], overrides)
    found = measure(cfg, report["world_size"])
    return {"torch": torch.__version__, "peak_bytes": found.peak, "phase": found.phase, "parts": found.parts}


def load_config(name: str, overrides: list[str]):
    """A config, named as in ``tune ls`` or a file, with overrides; and the number of devices that its run line names.

    Raises UserError if there is no such config, or ``tune run`` would refuse it.
    """
    from omegaconf import OmegaConf

    from gmt_tune.integrations.torchtune.config.check import check_keys
    from gmt_tune.integrations.torchtune.run.preference import OWN_KEYS

    cfg, text = read_config(name, overrides)
    with errors_of(name):
        check_keys(cfg, OWN_KEYS, only_known=True)
        OmegaConf.resolve(cfg)
    return cfg, devices_of_run_line(text)


def text_table(report: dict) -> str:
    """The rows of one config for people: GiB of one device."""
    devices = report["world_size"]
    lines = [f"{report['config']} on {devices} device{'s' if devices > 1 else ''}: GiB on each, an estimate", ""]
    width = max(len(row["name"]) for row in report["rows"])
    for row in report["rows"]:
        kind = "exact   " if row["exact"] else "estimate"
        lines.append(f"{row['name']:<{width}}  {row['device_bytes'] / GIB:8.2f}  {kind}  {row['note']}")
    lines.append(f"{'total':<{width}}  {report['device_bytes'] / GIB:8.2f}")
    if report["host_bytes"]:
        lines.append(f"{'in host memory':<{width}}  {report['host_bytes'] / GIB:8.2f}  for each device")
    saving = report["save_host_bytes"] / GIB
    lines.append(f"{'while it saves':<{width}}  {saving:8.2f}  in host memory, of the process that takes most")
    lines += ["", f"fits on: {_fits(report)}", *(f"assumes: {line}" for line in report["assumptions"])]
    if "measured" in report:
        lines += ["", *measured_lines(report)]
    return "\n".join(lines)


def measured_lines(report: dict) -> list[str]:
    """The parts of a simulated step at its peak, beside those of the estimate, which then has no reserve."""
    found = report["measured"]
    estimated: dict[str, int] = {}
    for row in report["rows"]:
        name = {"due gradients": "gradients"}.get(row["name"], row["name"])
        name = name if name in _HELD else _PASSING
        estimated[name] = estimated.get(name, 0) + row["device_bytes"] * (row["name"] != "reserve")
    lines = [
        f"a simulated step (PyTorch {found['torch']}, no GPU): GiB allocated on the first device at its peak, which is "
        f"in {found['phase']}",
        "",
        f"{'':<{len(_PASSING)}}  simulated  estimate",
    ]
    parts = [(name, found["parts"].get(name, 0), estimated.get(name, 0)) for name in (*_HELD, _PASSING)]
    parts.append(("in all", found["peak_bytes"], allocated_bytes(report)))
    for name, simulated, counted in parts:
        if simulated or counted:
            lines.append(f"{name:<{len(_PASSING)}}  {simulated / GIB:9.2f}  {counted / GIB:8.2f}")
    lines[-1] += f"  ({allocated_bytes(report) / found['peak_bytes'] - 1:+.1%})"
    return lines


def allocated_bytes(report: dict) -> int:
    """Bytes of the estimate that are tensors: without the reserve."""
    return sum(row["device_bytes"] for row in report["rows"] if row["name"] != "reserve")


def markdown_table(reports: list[dict]) -> str:
    """One line for each config: GiB of one device."""
    lines = [
        "| config | devices | weights | gradients | optimizer states | all else | total GiB each | fits on |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for report in reports:
        on_device = {row["name"]: row["device_bytes"] / GIB for row in report["rows"]}
        shown = [on_device.pop(name) for name in ("weights", "gradients", "optimizer states")]
        total = report["device_bytes"] / GIB
        cells = [f"{value:.1f}" for value in (*shown, sum(on_device.values()), total)]
        fits = f"{report['fits_on'][0]} or more" if _is_gpu(report) and report["fits_on"] else _fits(report)
        lines.append(f"| `{report['config']}` | {report['world_size']} | {' | '.join(cells)} | {fits} |")
    return "\n".join(lines)


def simulated_table(reports: list[dict], simulated: Mapping[str, dict]) -> str:
    """One line for each config that has been simulated: its peak, and what the estimate has without its reserve.

    Args:
        reports: of configs, as :func:`report` makes them.
        simulated: by name of the config, what :func:`measured` made.
    """
    lines = ["| config | devices | simulated GiB | in | estimated GiB | difference |", "|---|---:|---:|---|---:|---:|"]
    for report in reports:
        if (found := simulated.get(report["config"])) is None:
            continue
        peak, counted = found["peak_bytes"], allocated_bytes(report)
        numbers = f"{peak / GIB:.2f} | {found['phase']} | {counted / GIB:.2f} | {counted / peak - 1:+.1%}"
        lines.append(f"| `{report['config']}` | {report['world_size']} | {numbers} |")
    return "\n".join(lines)


def beside_table(reports: list[dict]) -> str:
    """One line for each part, one column for each config: GiB of one device."""
    columns = [{row["name"]: row["device_bytes"] for row in r["rows"]} | {"total": r["device_bytes"]} for r in reports]
    names = list(dict.fromkeys(name for column in columns for name in column if name != "total"))
    lines = [
        "| GiB on each device | " + " | ".join(f"`{r['config']}`" for r in reports) + " |",
        "|---|" + "---:|" * len(reports),
    ]
    for name in [*names, "total"]:
        cells = [f"{column[name] / GIB:.2f}" if name in column else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def card_table(reports: list[dict]) -> str:
    """One line for each model, one column for each card: the model's configs that need no larger card.

    A config's name is that of the line with what stands in the cell behind it; in brackets, how many cards it takes.
    Models are in the order of families and sizes; configs of selected entries alone come first.
    """
    from gmt_tune.memory import CARDS

    models: dict[str, dict[str, list[str]]] = {}
    for r in sorted(reports, key=lambda r: (_size(r["config"]), "_compact" not in r["config"])):
        before, mark, _ = r["config"].partition("_gmt")
        model = before + mark if mark else before.partition("_")[0]
        ending = r["config"].removeprefix(model)
        cell = (f"`{ending}`" if ending else "itself") + (f" ({r['world_size']})" if r["world_size"] > 1 else "")
        column = r["fits_on"][:1] if _is_gpu(r) else ["CPU"]
        for card in column:  # none, if it fits on no card
            models.setdefault(model, {}).setdefault(card, []).append(cell)
    columns = [card for card in ("CPU", *CARDS) if any(card in cells for cells in models.values())]
    lines = [f"| config | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for model, cells in models.items():
        lines.append(f"| `{model}` | {' | '.join(', '.join(cells.get(card, ())) for card in columns)} |")
    return "\n".join(lines)


def _size(name: str) -> tuple[str, float]:
    """The family of a config's model, and its parameters: ``("llama3_1", 8e9)``."""
    family, _, rest = name.partition("/")
    size = re.match(r"([\d.]+)([MB])", rest)
    return family, float(size[1]) * {"M": 1e6, "B": 1e9}[size[2]] if size else 0.0


def report(name: str, world_size: int | None, overrides: list[str]) -> dict:
    """The estimate of one config as plain data: bytes of one device, of as many as its run line names by default."""
    from gmt_tune.memory import cards_that_fit, estimate

    cfg, devices = load_config(name, overrides)
    result = estimate(cfg, world_size or devices)
    return {
        "config": name,
        **asdict(result),
        "device_bytes": result.device_bytes,
        "host_bytes": result.host_bytes,
        "fits_on": cards_that_fit(result.device_bytes),
    }


def _is_gpu(report: dict) -> bool:
    return not report["device"].startswith("cpu")


def _fits(report: dict) -> str:
    if not _is_gpu(report):
        return "a CPU"
    return ", ".join(report["fits_on"]) or "no single card: use more devices, or a low-memory config"
