"""Peak memory and time of `gmt-tune delta` and `apply`, beside the floor and the naive way, on two random folders.

The floor copies the files. The naive way loads both models, and keeps places and values of what differs. Each runs in a
process of its own; its peak is that of all its resident pages, of mapped files too.

    python benchmarks/delta.py benchmarks/results/delta_cpu.jsonl

Or: the time that a delta takes on a model in memory, beside reading the whole tuned model and copying it into place.

    python benchmarks/delta.py --running /tmp/SmolLM2-135M-Instruct /tmp/run/epoch_0
"""

import argparse
import json
import multiprocessing
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

LAYER = {"self_attn.q_proj": (2048, 2048), "mlp.up_proj": (8192, 2048), "mlp.down_proj": (2048, 8192)}
EMBEDDING = (128256, 2048)


def save_pair(folder: Path, layers: int, density: float, vocabulary: int) -> int:
    """Write ``base`` and ``tuned``, of random bf16, that part of whose entries differs; returns the entries of each."""
    from gmt_tune.reporting.safetensors_file import encode_header, write_file

    shapes = {"model.embed_tokens.weight": (vocabulary, EMBEDDING[1])}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in LAYER.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}

    def weights(is_tuned: bool):
        for i, (rows, columns) in enumerate(shapes.values()):
            for start in range(0, rows, 4096):
                generator = torch.Generator().manual_seed(rows * i + start)
                part = torch.randn(min(4096, rows - start), columns, generator=generator)
                if is_tuned:
                    moved = torch.rand(part.shape, generator=generator) < density
                    part = torch.where(moved, torch.randn(part.shape, generator=generator), part)
                yield part.bfloat16().view(torch.int16).numpy()

    for name in ("base", "tuned"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        write_file(folder / name / "model.safetensors", encode_header(header), weights(name == "tuned"))
    return end // 2


def delta(folder: Path) -> None:
    """`gmt-tune delta`"""
    _gmt_tune("delta", folder / "base", folder / "tuned", folder / "delta.safetensors", "--force")


def apply(folder: Path) -> None:
    """`gmt-tune apply`"""
    _gmt_tune("apply", folder / "base", folder / "delta.safetensors", folder / "again")


def remove(folder: Path) -> None:
    """`gmt-tune apply --remove`"""
    _gmt_tune("apply", "--remove", folder / "tuned", folder / "delta.safetensors", folder / "back")


def _gmt_tune(*arguments) -> None:
    from gmt_tune.cli.main import main

    assert main([*map(str, arguments)]) == 0


def copy(folder: Path) -> None:
    """the floor: copying one folder"""
    shutil.copytree(folder / "tuned", folder / "copied")


def naive(folder: Path) -> None:
    """the naive way: both models in memory, int64 places and values of what differs"""
    from safetensors.torch import load_file, save_file

    base, tuned = (load_file(folder / name / "model.safetensors") for name in ("base", "tuned"))
    found = {}
    for name, weight in base.items():
        found[f"{name}.places"] = (weight != tuned[name]).view(-1).nonzero().view(-1)
        found[f"{name}.values"] = tuned[name].view(-1)[found[f"{name}.places"]]
    save_file(found, folder / "naive.safetensors")


WAYS = {"delta": delta, "apply": apply, "remove": remove, "copy": copy, "naive": naive}
MADE = dict(zip(WAYS, ("delta.safetensors", "again", "back", "copied", "naive.safetensors"), strict=True))


def measure(way: str, folder: Path) -> dict[str, float]:
    """Peak memory, seconds and CPU seconds of one of ``WAYS``."""
    path = folder / MADE[way]
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(way, folder, sender))
    process.start()
    found = receiver.recv()
    process.join()
    return found


def _measured(way: str, folder: Path, sender) -> None:
    import gmt_tune.cli.diff  # noqa: F401  (what is imported is no part of the work)
    import gmt_tune.deltas.shira  # noqa: F401

    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    start, before = time.perf_counter(), time.process_time()
    WAYS[way](folder)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - before
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    sender.send({"peak_bytes": peak, "seconds": seconds, "cpu_seconds": cpu_seconds})


def time_running(base: Path, tuned: Path, repeats: int = 5) -> dict[str, float]:
    """Medians of CPU seconds on one thread, and how many entries differ."""
    from safetensors.torch import load_file

    from gmt_tune.deltas import Delta, apply_delta_, make_delta

    torch.set_num_threads(1)

    def load(folder: Path) -> dict[str, torch.Tensor]:
        files = sorted(folder.glob("model*.safetensors"))
        return {name: weight for file in files for name, weight in load_file(file).items()}

    wanted = load(tuned)
    model = {name: weight.to(wanted[name].dtype) for name, weight in load(base).items()}
    another = {name: weight.clone() for name, weight in model.items()}
    with tempfile.TemporaryDirectory() as folder:
        made = make_delta(base, tuned, Path(folder) / "delta.safetensors")
        delta, seconds = Delta(Path(folder) / "delta.safetensors"), []
        for _ in range(repeats):
            times = [time.process_time()]
            apply_delta_(model, delta)
            times.append(time.process_time())
            assert all(torch.equal(weight, wanted[name]) for name, weight in model.items())
            times.append(time.process_time())
            apply_delta_(model, delta, remove=True)
            times.append(time.process_time())
            for name, weight in load(tuned).items():
                another[name].copy_(weight)
            times.append(time.process_time())
            seconds.append([end - start for start, end in zip(times, times[1:], strict=False)])
    on, _, off, whole = (round(statistics.median(each), 2) for each in zip(*seconds, strict=True))
    return {"entries": made.changed, "on": on, "off": off, "whole_model": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="file of JSON lines")
    parser.add_argument("--running", type=Path, nargs=2, metavar=("BASE", "TUNED"), help="folders: time these instead")
    parser.add_argument("--layers", type=int, default=25, help="default: 25, which is 1.2 B parameters")
    parser.add_argument("--vocabulary", type=int, default=EMBEDDING[0])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 1.0], help="of the entries that differ")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the folders are made: 15 GB (default: the temporary folder)")
    arguments = parser.parse_args()
    if arguments.running:
        print(json.dumps(time_running(*arguments.running)))
        return
    if arguments.results is None:
        parser.error("name a file for the results, or give --running BASE TUNED")
    rows = []
    for density in arguments.densities:
        with tempfile.TemporaryDirectory(dir=arguments.work) as made:
            folder = Path(made)
            entries = save_pair(folder, arguments.layers, density, arguments.vocabulary)
            found = [{way: measure(way, folder) for way in WAYS} for _ in range(arguments.repeats)]
            for way, of_way in WAYS.items():
                made_files = [file for file in (folder / MADE[way], *(folder / MADE[way]).rglob("*")) if file.is_file()]
                rows.append(
                    {
                        "way": of_way.__doc__,
                        "entries": entries,
                        "density": density,
                        "peak_mib": round(max(each[way]["peak_bytes"] for each in found) / 2**20),
                        "seconds": round(statistics.median(each[way]["seconds"] for each in found), 1),
                        "cpu_seconds": round(statistics.median(each[way]["cpu_seconds"] for each in found), 1),
                        "bytes_written": sum(file.stat().st_size for file in made_files),
                    }
                )
                print(rows[-1], flush=True)
    arguments.results.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
