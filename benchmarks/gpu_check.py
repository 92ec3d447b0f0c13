"""Everything that only a GPU can show, in one go: see ``gpu.sh``, which runs this.

Parts run in the order of their worth, each in processes of its own, within its own time and the minutes given. What a
part found is a line of JSON in ``gpu.jsonl``, its exit status included, so that a part that fails or runs out of time
costs none of the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from selection import MODELS, make_gradients, timed

from gmt_tune import GradientMask

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
# Modes of the mask whose launches are counted: arguments of GradientMask
MODES = {
    "magnitude": {},
    "magnitude, refresh_every 3": {"refresh_every": 3},
    "saliency": {"score": "saliency"},
    "random": {"score": "random"},
    "scope global": {"scope": "global"},
}


# ------------------------------------------------------------------ parts that run in here


def describe_device(device: torch.device, rehearse: bool) -> list[dict]:
    """Name and versions, and the two ceilings: GB/s of a copy (read and written), TFLOP/s of a product in bf16."""
    n = 1 << (22 if rehearse else 31)
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 256 if rehearse else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    copy_ms = median_ms(lambda: target.copy_(source), device)
    product_ms = median_ms(lambda: a @ a, device)
    found = {"torch": torch.__version__, "python": platform.python_version(), "device": platform.processor()}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        found["triton"] = triton.__version__
    return [found | {"copy_gb_per_s": 2 * n / copy_ms / 1e6, "matmul_tflop_per_s": 2 * size**3 / product_ms / 1e9}]


def count_launches(device: torch.device, rehearse: bool) -> list[dict]:
    """For each mode of the mask, of one step: launches and device time by kernel, and what the host takes to launch."""
    rows = []
    for model in ("smollm2_135m",) if rehearse else ("smollm2_135m", "llama3_1_8b"):
        shapes = dict(list(MODELS[model].items())[:9]) if rehearse else MODELS[model]
        gradients = make_gradients(shapes, torch.bfloat16, device)
        parameters = {name: torch.nn.Parameter(gradient) for name, gradient in gradients.items()}
        for p in parameters.values():
            p.grad = torch.empty_like(p)
        for mode, arguments in MODES.items():
            mask = GradientMask(parameters.items(), 0.2, **arguments)
            for step in range(5):
                for p in parameters.values():
                    p.grad.copy_(p.detach())
                is_new = step % (mask.refresh_every or 1) == 0
                if step < 3:
                    mask.mask_grads_()
                elif step == 3 or not is_new:
                    kind = "" if mask.refresh_every == 1 else ", new selection" if is_new else ", kept selection"
                    rows.append({"model": model, "mode": mode + kind} | profiled(mask, device))
    return rows


def profiled(mask: GradientMask, device: torch.device) -> dict:
    """One step of a mask, with the eight kernels that take longest: how often each ran, and its milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    kernels = {}
    with profile(activities=[ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]) as profiler:
        total_ms = timed(mask.mask_grads_, device)
    if device.type == "cuda":
        events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = {e.key[:80]: (e.count, round(e.self_device_time_total / 1e3, 3)) for e in events}
    return {
        "launches": sum(count for count, _ in kernels.values()),
        "device_ms": sum(ms for _, ms in kernels.values()),
        "profiled_ms": total_ms,
        "host_ms": mask.seconds * 1e3,
        "kernels": dict(sorted(kernels.items(), key=lambda kernel: -kernel[1][1])[:8]),
    }


def select_sharded(device: torch.device, rehearse: bool) -> list[dict]:
    """Gradients that are DTensors on a mesh of one rank: the same entries as whole ones, and the time of both."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = dist.init_device_mesh(device.type, (1,))
    rows = []
    # A quarter of 8B: what each of four ranks holds
    quarter = {n: s for n, s in MODELS["llama3_1_8b"].items() if n.split(".")[0] in map(str, range(9))}
    models = {"smollm2_135m": MODELS["smollm2_135m"], "a quarter of llama3_1_8b": quarter}
    if rehearse:
        models = {"layers of smollm2_135m": dict(list(MODELS["smollm2_135m"].items())[1:10])}
    for model, shapes in models.items():
        gradients = make_gradients(shapes, torch.bfloat16, device)
        whole = {name: torch.nn.Parameter(torch.empty_like(g)) for name, g in gradients.items()}
        sharded = {
            name: torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in whole.items()
        }
        times = {}
        for kind, parameters in (("whole", whole), ("sharded", sharded)):
            mask = GradientMask(parameters.items(), 0.2)

            milliseconds = []
            for _ in range(4):
                for name, p in parameters.items():
                    fresh = gradients[name].clone()
                    p.grad = fresh if kind == "whole" else distribute_tensor(fresh, mesh, [Shard(0)])
                milliseconds.append(timed(mask.mask_grads_, device))
            times[kind] = statistics.median(milliseconds[1:])
        equal = all(torch.equal(p.grad, sharded[name].grad.to_local()) for name, p in whole.items())
        rows.append({"model": model, "equal": equal, "whole_ms": times["whole"], "sharded_ms": times["sharded"]})
    dist.destroy_process_group()
    return rows


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    run()
    return statistics.median(timed(run, device) for _ in range(10))


INSIDE = {"device": describe_device, "launches": count_launches, "sharded": select_sharded}


# ------------------------------------------------------------------ all parts, one after the other


def commands(device: str, rehearse: bool, scratch: Path) -> dict[str, tuple[int, list, Path]]:
    """By part: its most seconds, its command, and the JSON file that it leaves."""
    python, on_device = sys.executable, ["--device", device]

    def inside(name: str, *launcher: str) -> tuple[list, Path]:
        file = scratch / f"{name}.json"
        flags = ["--inside", name, "--json", file, *on_device] + ["--rehearse"] * rehearse
        return [python, *launcher, HERE / "gpu_check.py", *flags], file

    def training(name: str, model: str, *options: str) -> tuple[list, Path]:
        if rehearse:
            model, options = "tiny", ("--batch-size=2", "--seq-len=64", "--steps=2", "--warmup=1", "--optimizers=AdamW")
        file = scratch / f"{name}.json"
        return [python, HERE / "gpu_training.py", *on_device, "--model", model, *options, "--json", file], file

    def selection(name: str, *options: str) -> tuple[list, Path]:
        if rehearse:
            options = (
                "--model=smollm2_135m",
                "--dtype=bf16",
                "--rounds=1",
                "--method=memory floor",
                "--method=gmt-tune",
            )
        file = scratch / f"{name}.json"
        return [python, HERE / "selection.py", *on_device, *options, "--json", file], file

    def compact(name: str, *options: str) -> tuple[list, Path]:
        if rehearse:
            options = (*options, "--rounds=1", "--refresh-every=2", "--method=compact, 32 bits")
        file = scratch / f"{name}.json"
        return [python, HERE / "compact.py", *on_device, *options, "--json", file], file

    def recipe(name: str, config: str, *options: str) -> tuple[list, Path]:
        if rehearse:
            options = ("--tiny", "--steps=3")
        file = scratch / f"{name}.json"
        return [python, HERE / "recipe_memory.py", config, *options, "--json", file], file

    def tests(file: str, workers: int) -> tuple[list, Path]:
        marked = ["-k", "test_mask_equals_full_sort or test_equals_dense"] if rehearse else ["-m", "needs_gpu"]
        options = ["-q", "-n", min(workers, os.cpu_count() or 1), "--dist", "worksteal", "--durations", "8"]
        return [python, "-m", "pytest", *options, *marked, file], scratch / "none"

    own = ["memory floor", "gmt-tune", "gmt-tune, scope global", "gmt-tune, saliency", "gmt-tune, random"]
    fast = [f"--method={method}" for method in own]
    eight_bits = ["--optimizers", "AdamW8bit", "CompactAdamW"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    return {
        "device": (60, *inside("device")),
        "tests of the mask": (120, *tests("tests/masking/test_gpu.py", 6)),
        "tests of the recipes": (150, *tests("tests/recipes/test_gpu.py", 10)),
        "tests of compact steps": (120, *tests("tests/optim/test_gpu.py", 4)),
        "8b on a card of 24 gb": (150, *recipe("recipe_8b", "llama3_1/8B_gmt_compact", "--limit-gib=22.5")),
        "compact steps of smollm2": (90, *compact("compact_smollm2", "--model=smollm2_135m", "--dtype=bf16")),
        "selection of smollm2": (
            40,
            *selection("smollm2", "--model=smollm2_135m", "--rounds=5", *fast, "--method=torch.topk"),
        ),
        "selection of 8b, bf16": (
            50,
            *selection("8b_bf16", "--model=llama3_1_8b", "--dtype=bf16", "--rounds=2", *fast),
        ),
        "sharded": (50, *inside("sharded", *torchrun)),
        "launches": (40, *inside("launches")),
        "training of 8b, 8-bit": (
            150,
            *training("train_8b", "llama3_1_8b", *eight_bits, "--batch-size=2", "--warmup=10", "--steps=6"),
        ),
        "training of smollm2, 8-bit": (
            120,
            *training("train_smollm2", "smollm2_135m", *eight_bits, "--batch-size=16", "--seq-len=1024", "--warmup=10"),
        ),
        "selection of 8b, fp32": (
            50,
            *selection("8b_fp32", "--model=llama3_1_8b", "--dtype=fp32", "--rounds=1", *fast),
        ),
        "training of 8b, 32-bit": (
            60,
            *training(
                "train_8b_adamw", "llama3_1_8b", "--optimizers=AdamW", "--batch-size=2", "--warmup=2", "--steps=6"
            ),
        ),
    }


def run_part(command: list, seconds: float, file: Path) -> dict:
    """Run a command in a process group of its own, end it after its time, and read what it left."""
    start = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        status: int | str = process.returncode
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then says what failed so far
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        status = "out of time"
    found = output.strip().rpartition("\n")[2]  # of the tests: how many passed
    if file.is_file():
        found = json.loads(re.sub(r" --json \S+\.json", "", file.read_text()))
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "found": found, "output": output[-12000:]}


def markdown(lines: list[dict]) -> str:
    """What ``gpu.jsonl`` holds, as tables."""
    import compact
    import gpu_training
    import recipe_memory
    import selection

    text = []
    for line in lines:
        text.append(f"\n{line['part']}: {'done' if line['status'] == 0 else line['status']}, {line['seconds']} s\n")
        found = line["found"]
        if isinstance(found, str):
            text.append(found)
        elif isinstance(found, list):  # of a part in here: rows with the same columns
            columns = [key for key in found[0] if key != "kernels"]
            text.append("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
            for row in found:
                cells = (f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for key in columns)
                text.append("| " + " | ".join(cells) + " |")
        else:
            text.append(f"`{(found.get('environment') or found['setting'])['command']}`\n")
            if "rows" in found:
                whose = (
                    recipe_memory
                    if "config" in found["rows"][0]
                    else compact
                    if "refresh_every" in found
                    else selection
                )
                text.append(whose.table(found["rows"]))
            else:
                text.append(gpu_training.table(found["lines"]))
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of gpu.jsonl")
    parser.add_argument("--minutes", type=float, default=10, help="for all parts together")
    parser.add_argument("--part", action="append", help="one or several; default: all")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--device", help="default: cuda, with --rehearse cpu")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a gpu.jsonl as tables, and do nothing else")
    parser.add_argument("--inside", choices=INSIDE, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = args.device or ("cpu" if args.rehearse else "cuda")
    if args.show:
        print(markdown([json.loads(line) for line in args.show.read_text().splitlines()]))
        return 0
    if args.inside:
        args.json.write_text(json.dumps(INSIDE[args.inside](torch.device(device), args.rehearse)))
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here: --rehearse tries the parts on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    lines: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch, (args.out / "gpu.jsonl").open("w") as results:
        parts = commands(device, args.rehearse, Path(scratch))
        for unknown in set(args.part or ()) - parts.keys():
            parser.error(f"there is no part {unknown!r}: there are {', '.join(parts)}")
        # Tests need many cores and little of the device: those parts run side by side, the others alone
        chosen = [name for name in parts if name in (args.part or parts)]
        for _, group in itertools.groupby(chosen, key=lambda name: "tests" if name.startswith("tests") else name):
            left = end - time.monotonic()
            if left < 10:
                break
            with ThreadPoolExecutor() as pool:
                runs = {n: pool.submit(run_part, parts[n][1], min(parts[n][0], left), parts[n][2]) for n in group}
            for name, run in runs.items():
                line = {"part": name} | run.result()
                output = line.pop("output")
                print(f"=== {name}: {line['status']} after {line['seconds']} s\n{output}", flush=True)
                results.write(json.dumps(line) + "\n")
                results.flush()
                lines.append(line)
    failed = [line["part"] for line in lines if line["status"] != 0]
    print(markdown(lines))
    print(f"{len(failed)} parts failed: {failed}; {args.out / 'gpu.jsonl'} has the numbers")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
