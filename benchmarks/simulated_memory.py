"""The peak of a step of every shipped config, on simulated GPUs: ``gmt-tune memory --measure`` of each.

    python benchmarks/simulated_memory.py                       # all configs that the file lacks; takes an hour
    python benchmarks/simulated_memory.py --again llama3_1/8B_gmt

Needs PyTorch's build for CUDA and no GPU. ``scripts/make_configs.py`` puts what it found beside the estimates.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from gmt_tune.integrations.torchtune.plugin.registry import config_paths

RESULTS = Path(__file__).with_name("results") / "simulated_memory.json"


def measure(config: str) -> dict:
    """What ``gmt-tune memory`` found of one config, in a process of its own; raises CalledProcessError."""
    command = ["-m", "gmt_tune.cli.main", "memory", "--config", config, "--measure", "--json"]
    report = json.loads(subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE).stdout)
    return {"devices": report["world_size"], **report["measured"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="default: all that run on a GPU")
    parser.add_argument("--again", action="store_true", help="also those that the file has")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    args = parser.parse_args()
    on_gpus = [name for name, path in config_paths().items() if "\ndevice: cpu" not in path.read_text()]
    for config in args.configs or on_gpus:
        results = json.loads(args.json.read_text()) if args.json.exists() else {}
        if config in results and not args.again:
            continue
        found = measure(config)
        results = json.loads(args.json.read_text()) if args.json.exists() else {}  # another process may have gone on
        results[config] = found
        args.json.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        print(f"{config}: {found['peak_bytes'] / 2**30:.2f} GiB on each of {found['devices']}", flush=True)


if __name__ == "__main__":
    main()
