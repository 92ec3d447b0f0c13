"""``gmt-tune env``: what to paste into a bug report."""

import argparse
import platform

from gmt_tune._installed import installed_version

# What training goes through; of these, each that is installed
_DISTRIBUTIONS = (
    "gmt-tune", "torch", "triton", "torchao", "torchtune", "transformers", "accelerate", "trl", "peft", "deepspeed",
    "axolotl", "llamafactory", "ms-swift", "datasets", "tokenizers", "safetensors", "numpy",
)  # fmt: skip


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "env",
        help="print the versions and devices that a bug report needs",
        description="Print versions of Python and packages, and the devices: what a bug report needs. Prints no paths, "
        "names or keys.",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    import torch

    facts = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    facts |= {name: version for name in _DISTRIBUTIONS if (version := installed_version(name)) is not None}
    facts["torch is built for"] = f"CUDA {cuda}" if (cuda := torch.version.cuda) else "no CUDA"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        facts[f"device {i}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items()))
    return 0
