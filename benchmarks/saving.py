"""What saving and validating cost: seconds, and share of a run's time, on SmolLM2-135M or any other config's model.

Runs ``tune run gmt_full_finetune`` with checkpoints written while training waits, and with checkpoints written in the
background, and reads what the recipe says at the end. Prints a table in Markdown, and one of the host memory that a
save takes beside the estimate: the anonymous pages of the process that takes most, as Linux counts them while a
checkpoint is written, above what the process held before it, or in the background, above what it holds in a step.

    gmt-tune fetch smollm2-135m /tmp/SmolLM2-135M-Instruct
    python benchmarks/saving.py --data train.jsonl
    python benchmarks/saving.py --data train.jsonl --config smollm2/135M_gmt_single_device
    python benchmarks/saving.py --data train.jsonl --processes 2

``train.jsonl`` has ``{"question": ..., "answer": ...}`` on each line, such as GSM8K's.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from gmt_tune.integrations.torchtune.checkpoint.space import host_bytes_of_save

_SAID = re.compile(r"Trained for ([\d.]+) s, of which saving took ([\d.]+) s .* and validating ([\d.]+) s")


class HostMemory(threading.Thread):
    """Watches the processes of a run from outside while they write checkpoints, until the run has ended.

    Args:
        launched: process id of ``tune run``, which trains by itself or has started those that do.
        output: the run's ``output_dir``.
        processes: that train.
        is_async: training goes on, and takes memory too, as soon as each process writes its file: look until then.

    Attributes:
        bytes_of_save: what the process that takes most of the host's memory takes beyond what it held before a save.
    """

    def __init__(self, launched: int, output: Path, processes: int, is_async: bool) -> None:
        super().__init__(daemon=True)
        self._launched, self._output, self._is_async = launched, output, is_async
        self._processes = processes
        self.bytes_of_save = 0

    def run(self) -> None:
        before: dict[int, int] = {}
        has_trained = False
        while Path(f"/proc/{self._launched}").exists():
            held = {pid: _anonymous_bytes(pid) for pid in _with_children(self._launched)}
            folders = list(self._output.glob(".incomplete-*_*"))
            if not folders:
                before = held
            elif not has_trained:
                growth = max(size - before.get(pid, size) for pid, size in held.items())
                self.bytes_of_save = max(self.bytes_of_save, growth)
            files = sum(len(list(folder.glob("*/*.distcp"))) for folder in folders)
            has_trained = self._is_async and files >= self._processes
            time.sleep(0.002)


def _with_children(pid: int) -> list[int]:
    found = [pid]
    for pid in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


def _anonymous_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        if found := re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return int(found[1]) * 1024
    return 0


def run(arguments: argparse.Namespace, folder: Path, is_async: bool) -> dict[str, float]:
    """One run; what it says of itself, in seconds, and the bytes of its last checkpoint with an optimizer."""
    rows = Path(arguments.data).read_text().splitlines()
    held_out = folder / "held_out.jsonl"
    held_out.write_text("\n".join(rows[-arguments.val_rows :]) + "\n")
    output = folder / ("async" if is_async else "sync")
    overrides = {
        "output_dir": output,
        "dataset.source": "json",
        "dataset.data_files": Path(arguments.data).resolve(),
        "dataset.name": "null",
        "dataset_val._component_": "torchtune.datasets.instruct_dataset",
        "dataset_val.source": "json",
        "dataset_val.data_files": held_out,
        "dataset_val.split": "train",
        "dataset_val.column_map.input": "question",
        "dataset_val.column_map.output": "answer",
        "run_val_every_n_steps": arguments.every,
        "save_every_n_steps": arguments.every,
        "max_steps_per_epoch": arguments.steps,
        "keep_last_n_checkpoints": 2,
        "enable_async_checkpointing": is_async,
    }
    tune = Path(sys.executable).parent / "tune"
    processes = ["--nproc_per_node", arguments.processes] if arguments.processes > 1 else []
    command = [tune, "run", *processes, "gmt_full_finetune", "--config", arguments.config]
    command += [f"{key}={value}" for key, value in overrides.items()] + arguments.overrides
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    memory = HostMemory(process.pid, output, arguments.processes, is_async)
    memory.start()
    printed, _ = process.communicate()
    said = _SAID.search(printed)
    if process.returncode != 0 or said is None:
        raise SystemExit(printed[-6000:])
    total, saving, validating = map(float, said.groups())
    steps = list(output.glob("step_*"))
    whole = max(sum(f.stat().st_size for f in step.rglob("*") if f.is_file()) for step in steps)
    memory.join()
    host = {"host": memory.bytes_of_save, "estimate": estimate(steps[0], arguments.processes, is_async)}
    return {"total": total, "saving": saving, "validating": validating, "bytes": whole, **host}


def estimate(checkpoint: Path, processes: int, is_async: bool) -> int:
    """The same by the formula, from the sizes of what is in a checkpoint."""
    weights = []
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        weights += [t["data_offsets"][1] - t["data_offsets"][0] for name, t in header.items() if "shape" in t]
    state = checkpoint / "training_state"
    largest = max(
        chunk.sizes.numel() * tensor.properties.dtype.itemsize
        for tensor in FileSystemReader(state).read_metadata().state_dict_metadata.values()
        for chunk in tensor.chunks
    )
    return host_bytes_of_save(
        weights=sum(weights),
        largest_weight=max(weights),
        state=(state / "__0_0.distcp").stat().st_size,
        largest_state=largest,
        processes=processes,
        is_async=is_async,
        on_host=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2/135M_gmt_cpu")
    parser.add_argument("--data", required=True, help="train.jsonl")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps")
    parser.add_argument("--every", type=int, default=4, help="optimizer steps between two checkpoints and validations")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--val-rows", type=int, default=16, help="rows of held-out data, taken from the data's end")
    parser.add_argument("overrides", nargs="*", help="further key=value of the config")
    arguments = parser.parse_args()
    saves = -(-arguments.steps // arguments.every)
    step_names = "written while training waits", "written in the background"
    print("| checkpoints | GB each | steps | s/step | saves | s/save | share | validations | s each | share |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    host = []
    with tempfile.TemporaryDirectory() as folder:
        for is_async, name in enumerate(step_names):
            t = run(arguments, Path(folder), bool(is_async))
            step = (t["total"] - t["saving"] - t["validating"]) / arguments.steps
            print(
                f"| {name} | {t['bytes'] / 1e9:.2f} | {arguments.steps} | {step:.2f} | {saves} | "
                f"{t['saving'] / saves:.2f} | {t['saving'] / t['total']:.1%} | {saves} | "
                f"{t['validating'] / saves:.2f} | {t['validating'] / t['total']:.1%} |",
                flush=True,
            )
            host.append(f"| {name} | {arguments.processes} | {t['host'] / 1e6:.0f} | {t['estimate'] / 1e6:.0f} |")
    print("\n| checkpoints | processes | host memory of a save, MB | estimate, MB |\n|---|---:|---:|---:|")
    print("\n".join(host))


if __name__ == "__main__":
    main()
