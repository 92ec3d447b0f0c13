"""What each metric costs, beside the step that it is measured at: SmolLM2-135M.

Every number below is measured in the same process, right after the optimizer step that it belongs to. On a CPU it is
the processor time of all threads, which other programs on the machine do not add to; on a GPU, the time until the
device is done. The default is one micro-batch a step, a quarter of the CPU config's: shares are four times too high
rather than too low. The model has SmolLM2-135M's shapes and random weights, and random tokens to train on: neither
changes what is timed.

    python benchmarks/metrics_cost.py
    python benchmarks/metrics_cost.py --device cuda --dtype bf16 --rows 16 --accumulate 1
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gmt_tune import GradientMask
from gmt_tune.integrations.torchtune.run.progress import Progress
from gmt_tune.masking.tracker import SelectionTracker
from gmt_tune.models.smollm2 import smollm2_135m
from gmt_tune.reporting.mask_metrics import MaskMetrics
from gmt_tune.reporting.run_log import RunLog

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results"

# Row of the table: name, whether it is on by default, when it is due.
ROWS = {
    "totals": ("`mask/density`, `mask/seconds`, `mask/threshold_*`", True, "each logged step"),
    "run log": ("a line of `run_log.jsonl`", True, "each logged step"),
    "progress": ("the progress line", True, "each step"),
    "disk logger": ("torchtune's DiskLogger, without groups", True, "each logged step"),
    "detail": ("density and threshold of each tensor", True, "seldom"),
    "detail file": ("a line of `mask_detail.jsonl`", True, "seldom"),
    "groups": ("`mask_*_by_module`, `mask_*_by_layer`", True, "seldom"),
    "disk logger, groups": ("torchtune's DiskLogger, with groups", True, "seldom"),
    "tensorboard, groups": ("torchtune's TensorBoardLogger, with groups", False, "seldom"),
    "tracker": ("`track_selection_every_n_steps`: comparing selections", False, "each tracked step"),
    "tracker totals": ("`mask/overlap`, `mask/coverage`", False, "each logged step"),
    "tracker detail": ("overlap and coverage of each tensor", False, "seldom"),
}


class Stopwatch:
    """Seconds that named pieces of work took, one list per name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clock = time.process_time if device.type == "cpu" else time.perf_counter
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable, *arguments):
        """Call something; the device is waited for before and behind it."""
        self._wait()
        start = self._clock()
        result = work(*arguments)
        self._wait()
        self.seconds.setdefault(name, []).append(self._clock() - start)
        return result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Train some steps and time, at each, everything that could be logged. Returns seconds by name."""
    from torchtune.training.metric_logging import DiskLogger

    torch.manual_seed(0)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    with device:
        torch.set_default_dtype(dtype)
        model = smollm2_135m(max_seq_len=args.tokens)
        torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    mask = GradientMask(model.named_parameters(), density=0.2, dense=["*norm*"])
    mask.error_if_nonfinite = False  # as in the recipes, which look at the gradient themselves
    tracker = SelectionTracker(mask)  # not registered: timed by itself, on the masked gradient
    metrics = MaskMetrics(mask)
    masked = list(mask.masked_parameters.items())

    run_log = RunLog(folder)
    run_log.truncate_after(0)
    disk = DiskLogger(str(folder / "logs"))
    tensorboard = _tensorboard(folder)
    progress = Progress(1, args.steps + 1, 0, 1, is_shown=True)
    watch = Stopwatch(device)

    def train() -> None:
        for _ in range(args.accumulate):
            tokens = torch.randint(0, 49152, (args.rows, args.tokens), device=device)
            logits = model(tokens)
            logits = torch.cat(logits, dim=1) if isinstance(logits, list) else logits
            labels = tokens[:, 1:].reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(labels.numel(), -1).float(), labels)
            (loss / args.accumulate).backward()
        watch.time("mask", mask.mask_grads_)  # as the hook does inside optimizer.step()
        optimizer.step()

    for step in range(1, args.steps + 2):
        watch.time("step", train)
        numbers = watch.time("totals", metrics.totals)
        numbers |= {"loss": 1.0, "lr": 2e-5, "tokens_per_second_per_gpu": 100.0}
        detail = watch.time("detail", metrics.detail)
        groups = watch.time("groups", metrics.by_group, detail)
        watch.time("run log", run_log.log, step, numbers)
        watch.time("detail file", run_log.log_mask, step, lambda detail=detail: detail)
        watch.time("disk logger", disk.log_dict, numbers, step)
        watch.time("disk logger, groups", disk.log_dict, numbers | groups, step)
        if tensorboard is not None:
            watch.time("tensorboard, groups", tensorboard.log_dict, numbers | groups, step)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            watch.time("progress", progress.update, step, 1.0, 100.0, 0.1)
        watch.time("tracker", lambda: tracker._observe(masked))
        watch.time("tracker totals", tracker.metrics)
        watch.time("tracker detail", tracker.detail)
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step}: {watch.seconds['step'][-1]:.2f} s", flush=True)
    # The first step allocates the optimizer's state and warms everything up
    return {name: seconds[1:] for name, seconds in watch.seconds.items()}


def _tensorboard(folder: Path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return None
    from torchtune.training.metric_logging import TensorBoardLogger

    return TensorBoardLogger(str(folder / "tensorboard"))


def table(seconds: dict[str, list[float]]) -> str:
    """The medians as a Markdown table, and the sum of what is on by default."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    step = median["step"]
    lines = ["| metric | default | due | median | of a step |", "|---|---|---|---|---|"]
    for name, (what, is_default, due) in ROWS.items():
        if name in median:
            on = "on" if is_default else "off"
            lines.append(f"| {what} | {on} | {due} | {median[name] * 1e3:.2f} ms | {median[name] / step:.3%} |")
    for when, dues in (
        ("at a step with detail", ("each step", "each logged step", "seldom")),
        ("at any other step", ("each step", "each logged step")),
    ):
        parts = [n for n, (_, on, due) in ROWS.items() if on and due in dues]
        # With groups, the logger writes one line, not two
        parts = [n for n in parts if not (n == "disk logger" and "disk logger, groups" in parts)]
        total = sum(median[name] for name in parts)
        what = f"**all that is on by default, {when}**"
        lines.append(f"| {what} | | | **{total * 1e3:.2f} ms** | **{total / step:.3%}** |")
    mask = median["mask"]
    lines.append(f"| for comparison: the mask itself | on | each step | {mask * 1e3:.1f} ms | {mask / step:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the results beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--tokens", type=int, default=200, help="of a row: about the mean of GSM8K")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=6, help="that are measured, after one that is not")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/metrics_cost_DEVICE.json)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(args, Path(folder))
    device = platform.processor() or platform.machine()
    if args.device != "cpu":
        device = torch.cuda.get_device_name(args.device)
    about = {
        "command": "python benchmarks/metrics_cost.py",
        "device": f"{device}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "model": "SmolLM2-135M",
        **{key: getattr(args, key) for key in ("dtype", "rows", "tokens", "accumulate", "steps")},
    }
    output = args.output or RESULTS / f"metrics_cost_{args.device.partition(':')[0]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    rounded = {name: [round(value, 6) for value in values] for name, values in seconds.items()}
    output.write_text(json.dumps({**about, "seconds": rounded}, indent=1) + "\n")
    text = f"{json.dumps(about)}\n\nMedian step: {statistics.median(seconds['step']):.2f} s\n\n{table(seconds)}\n"
    output.with_suffix(".md").write_text(text)
    print(f"\n{text}\nWrote {output} and {output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
