"""How long compact steps take, and what they keep, beside optimizers with states for every entry.

    python benchmarks/compact.py                       SmolLM2-135M, bf16 and fp32
    python benchmarks/compact.py --model llama3_1_8b_layer --dtype bf16
    python benchmarks/compact.py --device cuda --dtype bf16

What is timed is everything that an optimizer and a mask add to a forward and a backward pass: for ``CompactAdamW`` the
hook that reduces each gradient to its selected entries, the selection of what is due, and the update; for the others
the update. A gradient is written right before its hook runs, as autograd writes it, which is not timed. Times are means
over ``--refresh-every`` steps, so that every tensor has its turn. Gradients are those of ``selection.py``, and change
from step to step. All methods take their steps in one process, one after the other and over and over, so that a busy
machine slows all of them. torchao's optimizer compiles itself before anything is timed. On CUDA a step ends when the
device is done.

Memory is what a method keeps between two steps beyond the weights, as every tensor it holds: states, selections, and
whatever else is left of gradients.
"""

import argparse
import functools
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from selection import DTYPES, MODELS, RESULTS, environment, make_gradients, save, timed
from torch import Tensor

from gmt_tune import CompactAdamW, GradientMask

CPU = torch.device("cpu")
SHIFT = 64  # entries by which gradients move from one step to the next


class Steps:
    """A model's parameters with gradients of their own size, and an optimizer whose steps are timed.

    Args:
        parameters: by name.
        optimizer: of these.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.optimizer = parameters, optimizer

    def step(self, gradients: dict[str, Tensor]) -> float:
        """A step without its forward and backward pass: milliseconds that it took. Gradients are not changed."""
        device = next(iter(self.parameters.values())).device
        # On CUDA all are written first: there is no waiting for the device between the hooks
        together = [list(self.parameters)] if device.type == "cuda" else [[name] for name in self.parameters]
        milliseconds = 0.0
        for names in together:
            for name in names:
                self.parameters[name].grad = gradients[name].clone()
            milliseconds += timed(functools.partial(self._run_hooks, names), device)
        return milliseconds + timed(self._update, device)

    def _run_hooks(self, names: list[str]) -> None:
        """As autograd does."""
        for p in (self.parameters[name] for name in names):
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                hook(p)

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def compact(parameters, density: float, refresh_every: int, state_bits: int) -> Steps:
    mask = GradientMask(parameters.items(), density, refresh_every=refresh_every, dense=["*norm*"])
    optimizer = CompactAdamW(parameters.values(), state_bits=state_bits)
    mask.register(optimizer)
    return Steps(parameters, optimizer)


def fused_adamw(parameters, *_) -> Steps:
    return Steps(parameters, torch.optim.AdamW(parameters.values(), fused=True))


def torchao_adamw_8bit(parameters, *_) -> Steps:
    from torchao.optim import AdamW8bit

    return Steps(parameters, AdamW8bit(parameters.values()))


METHODS: dict[str, Callable[..., Steps]] = {
    "torch AdamW, fused": fused_adamw,
    "compact, 32 bits": lambda *arguments: compact(*arguments, 32),
    "torchao AdamW8bit": torchao_adamw_8bit,
    "compact, 8 bits": lambda *arguments: compact(*arguments, 8),
}
BESIDE = {"compact, 32 bits": "torch AdamW, fused", "compact, 8 bits": "torchao AdamW8bit"}  # what each is measured by


def storages() -> dict[int, int]:
    """Bytes of the memory of every tensor that is alive, by address."""
    gc.collect()
    plain = [tensor for tensor in gc.get_objects() if type(tensor) in (Tensor, torch.nn.Parameter)]
    return {memory.data_ptr(): memory.nbytes() for memory in (tensor.untyped_storage() for tensor in plain)}


def measure(
    model: str,
    dtype: str,
    methods: list[str],
    density: float,
    refresh_every: int,
    rounds: int,
    device: torch.device = CPU,
) -> list[dict]:
    """One row of results for each method."""
    shapes = MODELS[model]
    extra = SHIFT * refresh_every
    memory = {}
    for name, gradient in make_gradients(shapes, DTYPES[dtype], device).items():
        flat = gradient.view(-1)
        memory[name] = torch.cat([flat, flat.repeat(-(-extra // flat.numel()))[:extra]])

    def gradients(step: int) -> dict[str, Tensor]:
        first = SHIFT * (step % refresh_every)
        return {
            name: memory[name][first : first + torch.Size(shape).numel()].view(shape) for name, shape in shapes.items()
        }

    entries = sum(torch.Size(shape).numel() for shape in shapes.values())
    rows: dict[str, dict] = {}
    all_steps, times = {}, {method: [] for method in methods}
    for method in methods:
        before = storages()
        weights = {name: torch.nn.Parameter(g.clone()) for name, g in gradients(0).items()}
        steps = all_steps[method] = METHODS[method](weights, density, refresh_every)
        for step in range(2 * refresh_every):  # every tensor has had its turn, and everything its first use
            steps.step(gradients(step))
        after = storages()
        kept = sum(size for address, size in after.items() if address not in before)
        kept -= sum(p.numel() * p.element_size() for p in weights.values())
        rows[method] = dict(
            model=model, dtype=dtype, entries=entries, method=method, kept_bytes_per_entry=kept / entries
        )
    for _ in range(rounds):
        for method in methods:
            taken = [all_steps[method].step(gradients(step)) for step in range(refresh_every)]
            times[method].append(statistics.mean(taken))
    for method in methods:
        rows[method] |= dict(median_ms=statistics.median(times[method]), fastest_ms=min(times[method]), rounds=rounds)
        if (beside := BESIDE.get(method)) in times:
            ratios = [own / other for own, other in zip(times[method], times[beside], strict=True)]
            rows[method] |= dict(beside=beside, ratio=statistics.median(ratios))
    return list(rows.values())


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| model | dtype | method | step, ms | of the time of | times | bytes kept per parameter |",
        "|---|---|---|---:|---|---:|---:|",
    ]
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['method']} | {row['median_ms']:.4g} | {row.get('beside', '')} "
            f"| {ratio} | {row['kept_bytes_per_entry']:.3f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="one or several; default: SmolLM2-135M")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="one or several; default: bf16, fp32")
    parser.add_argument("--method", choices=list(METHODS), action="append", help="one or several; default: all")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--refresh-every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5, help="how often each method goes through all turns")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, help="where to write the numbers; default: benchmarks/results/")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, but must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, device = [], torch.device(args.device)
    methods = [method for method in METHODS if method in (args.method or METHODS)]
    for model in args.model or ["smollm2_135m"]:
        for dtype in args.dtype or ["bf16", "fp32"]:
            print(f"measuring {model} in {dtype}", file=sys.stderr)
            rows += measure(model, dtype, methods, args.density, args.refresh_every, args.rounds, device)
    print(table(rows))
    settings = {"density": args.density, "refresh_every": args.refresh_every}
    path = args.json or RESULTS / f"compact_{args.device}.json"
    save(path, {"environment": environment(device), **settings, "rows": rows})


if __name__ == "__main__":
    main()
