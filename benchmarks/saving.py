"""What saving and validating cost: seconds, and share of a run's time, on SmolLM2-135M or any other config's model.

Runs ``tune run gmt_full_finetune`` with checkpoints written while training waits, and with checkpoints written in the
background, and reads what the recipe says at the end. Prints a table in Markdown.

    gmt-tune fetch smollm2-135m /tmp/SmolLM2-135M-Instruct
    python benchmarks/saving.py --data train.jsonl
    python benchmarks/saving.py --data train.jsonl --config smollm2/135M_gmt_single_device

``train.jsonl`` has ``{"question": ..., "answer": ...}`` on each line, such as GSM8K's.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_SAID = re.compile(r"Trained for ([\d.]+) s, of which saving took ([\d.]+) s .* and validating ([\d.]+) s")


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
    command = [tune, "run", "gmt_full_finetune", "--config", arguments.config]
    command += [f"{key}={value}" for key, value in overrides.items()] + arguments.overrides
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = _SAID.search(process.stdout + process.stderr)
    if process.returncode != 0 or said is None:
        raise SystemExit(process.stdout[-2000:] + process.stderr[-4000:])
    total, saving, validating = map(float, said.groups())
    whole = max(sum(f.stat().st_size for f in step.rglob("*") if f.is_file()) for step in output.glob("step_*"))
    return {"total": total, "saving": saving, "validating": validating, "bytes": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2/135M_gmt_cpu")
    parser.add_argument("--data", required=True, help="train.jsonl")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps")
    parser.add_argument("--every", type=int, default=4, help="optimizer steps between two checkpoints and validations")
    parser.add_argument("--val-rows", type=int, default=16, help="rows of held-out data, taken from the data's end")
    parser.add_argument("overrides", nargs="*", help="further key=value of the config")
    arguments = parser.parse_args()
    saves = -(-arguments.steps // arguments.every)
    step_names = "written while training waits", "written in the background"
    print("| checkpoints | GB each | steps | s/step | saves | s/save | share | validations | s each | share |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
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


if __name__ == "__main__":
    main()
