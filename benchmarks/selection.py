"""How long the mask takes beside what memory allows, and beside the usual ways to find a threshold.

    python benchmarks/selection.py                                  all models and dtypes that fit, on the GPU if any
    python benchmarks/selection.py --model smollm2_135m --dtype bf16
    python benchmarks/selection.py --training-step                  whole training steps of SmolLM2-135M

Gradients have the model's shapes and realistic tails: random signs, magnitudes log-normal within each row and from
row to row, and an embedding three quarters of whose rows are zero, as when their tokens did not occur. Every method
masks all of them in place; one after the other is timed, over and over, so that a busy machine slows all of them. The
floor is one read and one read-modify-write of the same bytes. What the exact methods leave is compared.

Peak memory is what a method needs besides the gradients: by the allocator's counters on CUDA, by resident memory on
the CPU.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gmt_tune import GradientMask, mask_grads_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULTS = Path(__file__).parent / "results"
SAMPLE = 1 << 20  # entries from which a quantile is estimated


def llama_shapes(vocab, dim, kv_dim, hidden_dim, layers, tied) -> dict[str, tuple[int, ...]]:
    """Shapes of a Llama's parameters by name."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (vocab, dim)} if vocab else {}
    for i in range(layers):
        shapes |= {f"{i}.q": (dim, dim), f"{i}.k": (kv_dim, dim), f"{i}.v": (kv_dim, dim), f"{i}.o": (dim, dim)}
        shapes |= {f"{i}.gate": (hidden_dim, dim), f"{i}.up": (hidden_dim, dim), f"{i}.down": (dim, hidden_dim)}
        shapes |= {f"{i}.norm1": (dim,), f"{i}.norm2": (dim,)}
    if vocab:
        shapes |= {"norm": (dim,)} | ({} if tied else {"output": (vocab, dim)})
    return shapes


MODELS = {
    "smollm2_135m": llama_shapes(49152, 576, 192, 1536, layers=30, tied=True),
    "llama3_2_1b": llama_shapes(128256, 2048, 512, 8192, layers=16, tied=True),
    "llama3_1_8b": llama_shapes(128256, 4096, 1024, 14336, layers=32, tied=False),
    "llama3_1_8b_layer": llama_shapes(0, 4096, 1024, 14336, layers=1, tied=False),
}
DEFAULT_MODELS = {
    "cpu": ["smollm2_135m", "llama3_2_1b", "llama3_1_8b_layer"],
    "cuda": ["smollm2_135m", "llama3_2_1b", "llama3_1_8b"],
}


def make_gradients(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Gradients by name, the same at each call."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    gradients = {}
    for name, shape in shapes.items():
        rows, columns = shape[0], math.prod(shape[1:])
        gradient = torch.empty(rows, columns, dtype=dtype, device=device)
        step = max(1, (1 << 22) // columns)
        for start in range(0, rows, step):
            n = min(step, rows - start)
            magnitude = (normal(n, columns) + normal(n, 1) - 10).exp_()
            magnitude *= normal(n, columns).sign_()
            if name == "embedding":
                magnitude *= torch.rand(n, 1, generator=generator, device=device) < 0.25
            gradient[start : start + n] = magnitude
        gradients[name] = gradient.view(shape)
    return gradients


# ------------------------------------------------------------------ the methods


def touch_memory(parameters: dict[str, Tensor], density: float) -> None:
    """The floor: reads every entry, then reads and writes it."""
    grads = [p.grad for p in parameters.values()]
    if grads[0].is_cuda:
        torch._foreach_norm(grads, math.inf)
    else:
        for grad in grads:
            grad.sum()
    torch._foreach_mul_(grads, 1.0)


def mask_by_gmt_tune(parameters: dict[str, Tensor], density: float) -> None:
    GradientMask(parameters.items(), density, dense=()).mask_grads_()


def mask_globally_by_gmt_tune(parameters: dict[str, Tensor], density: float) -> None:
    GradientMask(parameters.items(), density, dense=(), scope="global").mask_grads_()


def mask_by_saliency(parameters: dict[str, Tensor], density: float) -> None:
    mask_grads_(parameters.values(), density, score="saliency")


def mask_at_random(parameters: dict[str, Tensor], density: float) -> None:
    GradientMask(parameters.items(), density, dense=(), score="random").mask_grads_()


def mask_by_topk(parameters: dict[str, Tensor], density: float) -> None:
    for p in parameters.values():
        magnitude = p.grad.abs()
        threshold = magnitude.view(-1).topk(max(1, math.floor(density * p.numel()))).values[-1]
        p.grad.mul_(magnitude >= threshold)


def mask_by_kthvalue(parameters: dict[str, Tensor], density: float) -> None:
    for p in parameters.values():
        magnitude = p.grad.abs()
        k = max(1, math.floor(density * p.numel()))
        threshold = magnitude.view(-1).kthvalue(p.numel() - k + 1).values
        p.grad.mul_(magnitude >= threshold)


def mask_by_sampled_quantile(parameters: dict[str, Tensor], density: float) -> None:
    for p in parameters.values():
        magnitude = p.grad.abs()
        sample = magnitude.view(-1)
        if p.numel() > SAMPLE:
            sample = sample[torch.randint(p.numel(), (SAMPLE,), device=p.device)]
        threshold = torch.quantile(sample.float(), 1 - density)
        p.grad.mul_(magnitude >= threshold)


METHODS: dict[str, Callable[[dict[str, Tensor], float], None]] = {
    "memory floor": touch_memory,
    "gmt-tune": mask_by_gmt_tune,
    "gmt-tune, scope global": mask_globally_by_gmt_tune,
    "gmt-tune, saliency": mask_by_saliency,
    "gmt-tune, random": mask_at_random,
    "torch.topk": mask_by_topk,
    "torch.kthvalue": mask_by_kthvalue,
    "sampled torch.quantile": mask_by_sampled_quantile,
}
EXACT = ("gmt-tune", "torch.topk", "torch.kthvalue")  # must leave the same
SLOW = ("torch.topk", "torch.kthvalue", "sampled torch.quantile")  # are timed once a round, the others three times


# ------------------------------------------------------------------ measuring


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Milliseconds, from the call until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def peak_memory(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that a call needs at its peak besides what is there before; None where nothing shows it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed, but not given back, would not count again
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    except OSError:
        return None
    before = resident_peak()
    run()
    return resident_peak() - before


def resident_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def measure(model: str, dtype: str, methods: list[str], density: float, rounds: int, device: torch.device) -> list:
    """One row of results for each method."""
    pristine = make_gradients(MODELS[model], DTYPES[dtype], device)
    parameters = {}
    for name, gradient in pristine.items():
        # The weights are read only by saliency: the gradients themselves serve as well
        parameters[name] = torch.nn.Parameter(gradient)
        parameters[name].grad = gradient.clone()

    def restore() -> None:
        for name, p in parameters.items():
            p.grad.copy_(pristine[name])

    left: Tensor | None = None
    peaks, times = {}, {method: [] for method in methods}
    for method in methods:
        METHODS[method](parameters, density)  # first use of everything
        restore()
        peaks[method] = peak_memory(lambda method=method: METHODS[method](parameters, density), device)
        if method in EXACT:
            # Weighted sums of the bits: a second copy of all gradients would take too much memory
            found = torch.stack([checksum(p.grad) for p in parameters.values()])
            if left is not None and not torch.equal(found, left):
                sys.exit(f"{method} leaves other entries than an exact method before it: {model}, {dtype}")
            left = found
        restore()
    for _ in range(rounds):
        for method in methods:
            for _ in range(1 if method in SLOW else 3):
                times[method].append(timed(lambda method=method: METHODS[method](parameters, density), device))
                restore()
    entries = sum(p.numel() for p in parameters.values())
    largest = max(g.numel() * g.element_size() for g in pristine.values())
    floor_bytes = 3 * entries * DTYPES[dtype].itemsize  # read, then read and written
    return [
        dict(
            model=model,
            dtype=dtype,
            entries=entries,
            largest_tensor_bytes=largest,
            method=method,
            median_ms=statistics.median(times[method]),
            fastest_ms=min(times[method]),
            gb_per_s=floor_bytes / statistics.median(times[method]) / 1e6,
            repetitions=len(times[method]),
            peak_bytes=peaks[method],
        )
        for method in methods
    ]


def checksum(tensor: Tensor) -> Tensor:
    """An integer that differs for tensors whose entries differ anywhere; products wrap around."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in tensor.view(-1).split(1 << 22):
        # Adding 0 makes 0 of -0, which multiplying by a mask leaves
        part = (part + 0).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
        weights = torch.arange(part.numel(), device=part.device).mul_(0x9E3779B97F4A7C1).bitwise_or_(1)
        total = total * 31 + (part * weights).sum()
    return total


def bytes_free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def bytes_needed(model: str, dtype: str) -> int:
    """Two copies of the gradients, and for ``topk`` of the largest one 32-bit values and 64-bit indices."""
    sizes = [math.prod(shape) for shape in MODELS[model].values()]
    return 2 * sum(sizes) * DTYPES[dtype].itemsize + 24 * max(sizes)


# ------------------------------------------------------------------ showing


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| model | dtype | method | median ms | times the floor | faster than topk | peak memory, MB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        beside = {r["method"]: r["median_ms"] for r in rows if (r["model"], r["dtype"]) == (row["model"], row["dtype"])}
        floor, topk = beside.get("memory floor"), beside.get("torch.topk")
        cells = [row["model"], row["dtype"], row["method"], f"{row['median_ms']:.4g}"]
        cells.append(f"{row['median_ms'] / floor:.2f}" if floor else "")
        cells.append(f"{topk / row['median_ms']:.1f}" if topk else "")
        cells.append("" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def environment(device: torch.device) -> dict[str, object]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor()
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten to {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="one or several; default: three")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="one or several; default: bf16, fp32")
    parser.add_argument("--method", choices=list(METHODS), action="append", help="one or several; default: all")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=5, help="how often each method is timed (fast ones three times)")
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--json", type=Path, help="where to write the numbers; default: benchmarks/results/")
    parser.add_argument("--training-step", action="store_true", help="time whole steps of SmolLM2-135M instead")
    parser.add_argument("--batch-size", type=int, help="sequences in a training step; default: 4, on CUDA 16")
    parser.add_argument("--seq-len", type=int, help="tokens in a sequence; default: 128, on CUDA 1024")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.training_step:
        from training_step import measure_steps, steps_table

        dtypes = args.dtype or ["bf16"]
        batch = args.batch_size or (16 if args.device == "cuda" else 4)
        seq_len = args.seq_len or (1024 if args.device == "cuda" else 128)
        rows = [measure_steps(DTYPES[d], d, args.density, batch, seq_len, args.rounds, device) for d in dtypes]
        print(steps_table(rows))
        path = args.json or RESULTS / f"training_step_{args.device}.json"
    else:
        rows = []
        for model in args.model or DEFAULT_MODELS[args.device]:
            for dtype in args.dtype or ["bf16", "fp32"]:
                if bytes_needed(model, dtype) > bytes_free(device):
                    gigabytes = bytes_needed(model, dtype) / 1e9
                    print(f"{model} in {dtype} is left out: it needs {gigabytes:.0f} GB of memory", file=sys.stderr)
                    continue
                print(f"measuring {model} in {dtype}", file=sys.stderr)
                methods = [method for method in METHODS if method in (args.method or METHODS)]
                rows += measure(model, dtype, methods, args.density, args.rounds, device)
        print(table(rows))
        path = args.json or RESULTS / f"selection_{args.device}.json"
    save(path, {"environment": environment(device), "density": args.density, "rows": rows})


if __name__ == "__main__":
    main()
