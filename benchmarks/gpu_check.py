"""Everything that only a GPU can show, in one go: see ``gpu.sh``, which runs this.

Parts run in the order of their worth, each in processes of its own, within its own time and the minutes given. What a
part found is a line of JSON in ``gpu.jsonl``, its exit status included, so that a part that fails or runs out of time
costs none of the others. What a device has too little memory for is left out, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from selection import MODELS, make_gradients, timed

from gmt_tune import CompactAdamW, GradientMask

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
GIB_OF_8B_STEPS = 40  # weights and gradients in bf16, and what copies and selections take
LEFT_OUT, NO_TIME = "left out", "no time left"


class Part(NamedTuple):
    """One part of the check.

    Attributes:
        seconds: it may take at most.
        command: that runs it.
        file: JSON that it leaves; where there is none, the last line that it prints is what it found.
        gib: of device memory that it needs.
        goes_on: until it is ended: running out of time is no failure.
    """

    seconds: float
    command: list
    file: Path
    gib: float = 0
    goes_on: bool = False


# ------------------------------------------------------------------ parts that run in here


def describe_device(device: torch.device, rehearse: bool, out: Path) -> list[dict]:
    """Name and versions, and the two ceilings: GB/s of a copy (read and written), TFLOP/s of a product in bf16."""
    size = 256 if rehearse else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product_ms = median_ms(lambda: a @ a, device)
    found = {"torch": torch.__version__, "python": platform.python_version(), "device": platform.processor()}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        found["triton"] = triton.__version__
    found["copy_gb_per_s"] = copy_gb_per_s(device, rehearse)
    return [found | {"matmul_tflop_per_s": 2 * size**3 / product_ms / 1e9}]


def copy_gb_per_s(device: torch.device, rehearse: bool) -> float:
    source = torch.randint(0, 255, (1 << (22 if rehearse else 31),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device) / 1e6


def count_launches(device: torch.device, rehearse: bool, out: Path) -> list[dict]:
    """For each mode of the mask, of one step: launches and device time by kernel, and what the host takes to launch."""
    rows = []
    for model in ("smollm2_135m",) if rehearse or gib_of(device) < GIB_OF_8B_STEPS else ("smollm2_135m", "llama3_1_8b"):
        shapes = dict(list(MODELS[model].items())[:9]) if rehearse else MODELS[model]
        gradients = make_gradients(shapes, torch.bfloat16, device)
        parameters = {name: torch.nn.Parameter(gradient) for name, gradient in gradients.items()}
        for p in parameters.values():
            p.grad = torch.empty_like(p)
        for mode, arguments in MODES.items():
            mask = GradientMask(parameters.items(), 0.2, dense=(), **arguments)
            for step in range(5):
                for p in parameters.values():
                    p.grad.copy_(p.detach())
                is_new = step % (mask.refresh_every or 1) == 0
                if step < 3:
                    mask.mask_grads_()
                elif step == 3 or not is_new:
                    kind = "" if mask.refresh_every == 1 else ", new selection" if is_new else ", kept selection"
                    rows.append({"model": model, "mode": mode + kind} | profiled(mask.mask_grads_, mask, device))
    return rows


def profiled(run: Callable[[], object], mask: GradientMask, device: torch.device, trace: Path | None = None) -> dict:
    """One step of a mask, with the eight kernels that take longest: how often each ran, and its milliseconds.

    ``trace`` gets all of it for chrome://tracing, with what the host did.
    """
    from torch.profiler import ProfilerActivity, profile

    kernels = {}
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    activities += [ProfilerActivity.CPU] if trace or not activities else []
    with profile(activities=activities) as profiler:
        total_ms = timed(run, device)
    if trace:
        profiler.export_chrome_trace(str(trace))
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


def profile_steps(device: torch.device, rehearse: bool, out: Path) -> list[dict]:
    """A masked and a compact step beside their floor and the estimate on paper; ``out`` gets a trace of each.

    Of the compact one every tensor has had its turn, and the hooks of one micro-batch are part of it.
    """
    from gpu_training import COMPACT
    from paper_estimate import Card, compact_work, mask_work

    refresh_every = 2 if rehearse else COMPACT["refresh_every"]
    card = Card("this one", copy_gb_per_s(device, rehearse))
    rows = []
    for model in ("smollm2_135m",) if rehearse or gib_of(device) < GIB_OF_8B_STEPS else ("smollm2_135m", "llama3_1_8b"):
        shapes = dict(list(MODELS[model].items())[1:10]) if rehearse else MODELS[model]
        gradients = make_gradients(shapes, torch.bfloat16, device)
        parameters = {name: torch.nn.Parameter(gradient) for name, gradient in gradients.items()}
        sizes = {name: p.numel() for name, p in parameters.items()}

        def write_gradients(parameters=parameters) -> None:
            """Those of each step are the same; a weight serves as its gradient as well as anything else."""
            for p in parameters.values():
                p.grad = p.detach().clone()

        def run_hooks(parameters=parameters) -> None:
            """As autograd does."""
            for p in parameters.values():
                for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                    hook(p)

        mask = GradientMask(parameters.items(), 0.2, dense=())
        write_gradients()
        mask.mask_grads_()
        write_gradients()
        found = profiled(mask.mask_grads_, mask, device, out / f"{model}_masked_step.json.gz")
        work = mask_work(sizes, itemsize=2)
        beside = {"floor_ms": work.floor_ms(card), "estimated_ms": work.device_ms(card)}
        rows.append({"model": model, "step": "masked"} | beside | found)

        mask = GradientMask(parameters.items(), COMPACT["density"], refresh_every=refresh_every, dense=["*norm*"])
        optimizer = CompactAdamW(parameters.values(), state_bits=8, bf16_stochastic_round=True)
        mask.register(optimizer)

        def step(optimizer=optimizer, run_hooks=run_hooks) -> None:
            run_hooks()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2 * refresh_every):
            write_gradients()
            step()
        write_gradients()
        found = profiled(step, mask, device, out / f"{model}_compact_step.json.gz")
        work = compact_work(sizes, COMPACT["density"], refresh_every, micro_batches=1)
        beside = {"floor_ms": work.floor_ms(card), "estimated_ms": work.device_ms(card)}
        rows.append({"model": model, "step": "compact"} | beside | found)
    return rows


def kill_and_resume(device: torch.device, rehearse: bool, out: Path) -> list[dict]:
    """Runs that SIGKILL ends in the middle and that go on: the weights of a run that nobody ended, bit for bit."""
    from recipe_memory import BIN, OURS, TINY, TINY_OPTIMIZER, overrides_of, write_model
    from safetensors.torch import load_file

    def weights_in(folder: Path) -> dict[str, torch.Tensor]:
        files = sorted(folder.glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    settings = TINY | {"device": device.type, "dtype": "bf16", "epochs": 1, "seed": 0}
    settings |= {"batch_size": 2, "gradient_accumulation_steps": 2, "save_every_n_steps": 10}
    settings |= {"max_steps_per_epoch": 40 if rehearse else 100, "optimizer.lr": 1e-2}
    kinds = {"masked": ("llama3_1/8B_gmt_single_device", TINY_OPTIMIZER), "compact": ("llama3_1/8B_gmt_compact", [])}
    rows = []
    for kind, (config, more) in list(kinds.items())[rehearse:]:
        with tempfile.TemporaryDirectory() as scratch:
            folder, overrides = Path(scratch), overrides_of(settings)
            (folder / "model").mkdir()
            inputs = write_model(folder / "model", overrides, config, device.type)
            command = [BIN / "tune", "run", OURS, "--config", config, *inputs, *overrides, *more]
            outputs = {name: folder / name for name in ("straight", "killed")}
            commands = {name: [*map(str, command), f"output_dir={path}"] for name, path in outputs.items()}
            subprocess.run(commands["straight"], check=True)
            process = subprocess.Popen(commands["killed"])
            while process.poll() is None and not (outputs["killed"] / "step_20").is_dir():
                time.sleep(0.01)
            process.kill()
            was_running = process.wait() == -signal.SIGKILL
            kept = len(list(outputs["killed"].glob("step_*")))
            subprocess.run([*commands["killed"], "resume_from_checkpoint=True"], check=True)
            ends = (outputs[name] / "epoch_0" for name in ("killed", "straight"))
            weights, wanted, before = map(weights_in, (*ends, folder / "model"))
            differing = [name for name in wanted if not torch.equal(weights[name], wanted[name])]
            moved = [name for name in wanted if not torch.equal(before[name], wanted[name])]
        rows.append({"kind": kind, "checkpoints when killed": kept, "moved": len(moved), "differing": len(differing)})
        rows[-1]["equal"] = was_running and len(moved) > 10 and not differing and weights.keys() == wanted.keys()
    return rows


# The methods of a suite that takes longer: GSM8K and SmolLM2 must be there, as docs/results.md says.
_ON_GSM8K = ("sft", "gmt_0.2", "compact_0.2_refresh10", "compact_0.05_refresh10", "lora")


def measure_quality(device: torch.device, rehearse: bool, out: Path) -> list[dict]:
    """Runs of ``benchmarks/quality``, whose results ``out`` keeps: what is there already is not made again."""
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks.quality import __main__ as quality
    from benchmarks.quality import results

    results.RUNS = out / "quality"
    suites = [["village_small_gpu"], ["gsm8k_gpu", *_ON_GSM8K]]
    if rehearse:
        suites = [["village_small", "sft", "--seeds", "0", "--lr", "2e-3"]]
    failed = False  # what was made until the time is over counts
    with contextlib.suppress(KeyboardInterrupt):
        for arguments in suites:
            failed |= bool(quality.main(["run", *arguments, *(["--fork"] if device.type == "cpu" else [])]))
    if failed:
        raise RuntimeError("runs failed: what they said is above")
    return [
        {
            "run": name,
            "losses": result.get("losses"),
            "accuracy": result.get("accuracy"),
            "failed": result.get("failed"),
        }
        for arguments in suites
        for name, result in results.read_all(arguments[0]).items()
    ]


def select_sharded(device: torch.device, rehearse: bool, out: Path) -> list[dict]:
    """Gradients that are DTensors, searched digit by digit as those of many ranks are: the same entries as whole ones.

    And the time of both. The mesh has one rank, which gmt-tune would see as a whole tensor: here it is a shard.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    from gmt_tune.masking import dtensors
    from gmt_tune.masking.parts import part_of

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = dist.init_device_mesh(device.type, (1,))
    dtensors.sharding_dims = lambda tensor: list(range(len(tensor.placements)))  # also where one rank has all
    assert part_of(distribute_tensor(torch.ones(2, device=device), mesh, [Shard(0)])).groups
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
        found = {}
        for kind, parameters in (("whole", whole), ("sharded", sharded)):
            mask = GradientMask(parameters.items(), 0.2, dense=())

            def write_gradients(kind=kind, parameters=parameters, gradients=gradients) -> None:
                for name, p in parameters.items():
                    fresh = gradients[name].clone()
                    p.grad = fresh if kind == "whole" else distribute_tensor(fresh, mesh, [Shard(0)])

            milliseconds = []
            for _ in range(4):
                write_gradients()
                milliseconds.append(timed(mask.mask_grads_, device))
            write_gradients()
            step = profiled(mask.mask_grads_, mask, device)
            found |= {f"{kind}_ms": statistics.median(milliseconds[1:]), f"{kind}_launches": step["launches"]}
            found[f"{kind}_device_ms"] = step["device_ms"]
        equal = all(torch.equal(p.grad, sharded[name].grad.to_local()) for name, p in whole.items())
        rows.append({"model": model, "equal": equal} | found)
    dist.destroy_process_group()
    return rows


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    run()
    return statistics.median(timed(run, device) for _ in range(10))


def gib_of(device: torch.device) -> float:
    """All of its memory; of a CPU as much as anything needs, as it rehearses with small sizes."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else float("inf")


INSIDE = {
    "device": describe_device,
    "kill and resume": kill_and_resume,
    "profile": profile_steps,
    "sharded": select_sharded,
    "launches": count_launches,
    "quality": measure_quality,
}


# ------------------------------------------------------------------ all parts, one after the other


def parts_of(device: str, rehearse: bool, scratch: Path, out: Path) -> dict[str, Part]:
    """All parts, in the order of their worth."""
    python, on_device = sys.executable, ["--device", device]

    def inside(seconds: float, name: str, *launcher: str, **more) -> Part:
        file = scratch / f"{name}.json"
        flags = ["--inside", name, "--json", file, "--out", out, *on_device] + ["--rehearse"] * rehearse
        return Part(seconds, [python, *launcher, HERE / "gpu_check.py", *flags], file, **more)

    def script(seconds: float, name: str, file: str, *options: object, gib: float = 0) -> Part:
        found = scratch / f"{file}.json"
        return Part(seconds, [python, HERE / f"{name}.py", *options, "--json", found], found, gib)

    def training(seconds: float, file: str, model: str, *options: str, gib: float) -> Part:
        if rehearse:
            model, options = "tiny", ("--batch-size=2", "--seq-len=64", "--steps=2", "--warmup=1", "--optimizers=AdamW")
        return script(seconds, "gpu_training", file, *on_device, "--model", model, *options, gib=gib)

    def selection(seconds: float, file: str, *options: str, gib: float = 0) -> Part:
        if rehearse:
            options = (
                "--model=smollm2_135m",
                "--dtype=bf16",
                "--rounds=1",
                "--method=memory floor",
                "--method=gmt-tune",
            )
        return script(seconds, "selection", file, *on_device, *options, gib=gib)

    def compact(seconds: float, file: str, *options: str) -> Part:
        if rehearse:
            options = (*options, "--rounds=1", "--refresh-every=2", "--method=compact, 32 bits")
        return script(seconds, "compact", file, *on_device, *options)

    def recipe(seconds: float, file: str, *options: object, gib: float = 0) -> Part:
        """Of a size, the first part writes the model."""
        model_folder = scratch / file.partition("_")[0]
        if rehearse:
            options = (*(option for option in options if not str(option).startswith("--limit")), "--tiny", "--steps=3")
        return script(seconds, "recipe_memory", file, *options, "--model-folder", model_folder, gib=gib)

    def tests(seconds: float, folder: str, workers: int) -> Part:
        is_tried = rehearse and folder != "recipes"
        marked = ["-k", "test_mask_equals_full_sort or test_equals_dense"] if is_tried else ["-m", "needs_gpu"]
        options = ["-q", "-n", min(workers, os.cpu_count() or 1), "--dist", "worksteal", "--durations", "8"]
        file = f"tests/{folder}/test_gpu.py"
        return Part(seconds, [python, "-m", "pytest", *options, *marked, file], scratch / "none")

    own = ["memory floor", "gmt-tune", "gmt-tune, scope global", "gmt-tune, saliency", "gmt-tune, random"]
    fast = [f"--method={method}" for method in own]
    eight_bits = ["--optimizers", "AdamW8bit", "CompactAdamW"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    smollm2 = ["smollm2/135M_gmt_single_device", "smollm2/135M_gmt_compact_cpu", "--beside-torchtune", "--steps=20"]
    smollm2 += ["--accumulation=1", "--override", "batch_size=8" if rehearse else "batch_size=16"]
    if not rehearse:
        smollm2 += ["device=cuda", "dtype=bf16", "model.max_seq_len=1024", "tokenizer.max_seq_len=1024"]
        smollm2 += ["log_peak_memory_stats=True"]
    return {
        "device": inside(60, "device"),
        # Tests need many cores and little of the device: they run side by side, the other parts alone
        "tests of the mask": tests(120, "masking", 6),
        "tests of the recipes": tests(150, "recipes", 10),
        "tests of compact steps": tests(120, "optim", 4),
        "kill and resume": inside(100, "kill and resume"),
        "8b, compact, on a card of 24 gb": recipe(
            150, "8b_compact", "llama3_1/8B_gmt_compact", "--limit-gib=22.4", gib=22.4
        ),
        "8b, single device": recipe(130, "8b_single", "llama3_1/8B_gmt_single_device", "--steps=3", gib=52),
        "8b, low memory": recipe(130, "8b_low", "llama3_1/8B_gmt_low_memory", "--steps=3", gib=37),
        "smollm2 beside torchtune's recipe": recipe(180, "smollm2_recipes", *smollm2, gib=36),
        "profile": inside(70, "profile"),
        "sharded": inside(50, "sharded", *torchrun, gib=20),
        "compact steps of smollm2": compact(90, "compact_smollm2", "--model=smollm2_135m", "--dtype=bf16"),
        "selection of smollm2": selection(
            40, "smollm2", "--model=smollm2_135m", "--rounds=5", *fast, "--method=torch.topk"
        ),
        "selection of 8b, bf16": selection(
            50, "8b_bf16", "--model=llama3_1_8b", "--dtype=bf16", "--rounds=2", *fast, gib=44
        ),
        "launches": inside(40, "launches"),
        "training of 8b, 8-bit": training(
            150, "train_8b", "llama3_1_8b", *eight_bits, "--batch-size=2", "--warmup=10", "--steps=6", gib=52
        ),
        "selection of 8b, fp32": selection(
            50, "8b_fp32", "--model=llama3_1_8b", "--dtype=fp32", "--rounds=1", *fast, gib=74
        ),
        "training of 8b, 32-bit": training(
            60,
            "train_8b_adamw",
            "llama3_1_8b",
            *("--optimizers=AdamW", "--batch-size=2", "--warmup=2", "--steps=6"),
            gib=68,
        ),
        "quality": inside(float("inf"), "quality", goes_on=True),
    }


def left_out(part: Part, gib: float) -> str | None:
    """Why a device with this much memory cannot run a part; None where it can."""
    if part.gib <= gib:
        return None
    return f"left out: it needs {part.gib:g} GiB of device memory, and this device has {gib:.1f}"


def run_part(part: Part, seconds: float) -> dict:
    """Run a part in a process group of its own, end it after so many seconds, and read what it left."""
    start = time.monotonic()
    process = subprocess.Popen(
        list(map(str, part.command)),
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
        status = 0 if part.goes_on else "out of time"
    found = output.strip().rpartition("\n")[2]  # of the tests: how many passed
    if part.file.is_file():
        found = json.loads(re.sub(r' --(json|model-folder) [^\s"]+', "", part.file.read_text()))
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
        elif isinstance(found, list) and found:  # of a part in here: rows with the same columns
            columns = [key for key in found[0] if key != "kernels"]
            text.append("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
            for row in found:
                cells = (f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for key in columns)
                text.append("| " + " | ".join(cells) + " |")
        elif found:
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
    parser.add_argument("--minutes", type=float, help="for all parts together; default: 10, to rehearse them 30")
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
    args.out = args.out.absolute()
    if args.inside:
        rows = INSIDE[args.inside](torch.device(device), args.rehearse, args.out)
        args.json.write_text(json.dumps(rows))
        return int(any(row.get("equal") is False for row in rows))
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here: --rehearse tries the parts on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * (args.minutes or (30 if args.rehearse else 10))
    gib = float("inf")  # on a CPU, which rehearses with small sizes
    if device != "cpu":
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # this process holds none of it
            gib = pool.submit(gib_of, torch.device(device)).result()
    lines: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch, (args.out / "gpu.jsonl").open("w") as results:
        parts = parts_of(device, args.rehearse, Path(scratch), args.out)
        for unknown in set(args.part or ()) - parts.keys():
            parser.error(f"there is no part {unknown!r}: there are {', '.join(parts)}")

        def note(name: str, line: dict) -> None:
            output = line.pop("output", line["found"])
            print(f"=== {name}: {line['status']} after {line['seconds']} s\n{output}", flush=True)
            lines.append({"part": name} | line)
            results.write(json.dumps(lines[-1]) + "\n")
            results.flush()

        chosen = [name for name in parts if name in (args.part or parts)]
        for _, group in itertools.groupby(chosen, key=lambda name: "tests" if name.startswith("tests") else name):
            left = end - time.monotonic()
            runs = {}
            with ThreadPoolExecutor() as pool:
                for name in group:
                    why, part = left_out(parts[name], gib), parts[name]
                    if why or left < (60 if part.goes_on else 10):
                        note(name, {"status": LEFT_OUT if why else NO_TIME, "seconds": 0, "found": why or NO_TIME})
                    else:
                        seconds = part.seconds * (3 if args.rehearse else 1)  # a CPU may have few cores, and be busy
                        runs[name] = pool.submit(run_part, part, min(seconds, left - 15 * part.goes_on))
            for name, run in runs.items():
                note(name, run.result())
    failed = [line["part"] for line in lines if line["status"] not in (0, LEFT_OUT, NO_TIME)]
    late = [line["part"] for line in lines if line["status"] == NO_TIME]
    print(markdown(lines))
    print(f"{len(failed)} parts failed: {failed}; {args.out / 'gpu.jsonl'} has the numbers")
    if late:
        print(f"{len(late)} parts had no time left: {late}; --minutes gives more, --part takes some of them")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
