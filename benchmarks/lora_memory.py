"""The memory of torchtune's LoRA of Llama 3.1 8B, by the estimate and with the settings of docs/choosing.md.

    python benchmarks/lora_memory.py
    python benchmarks/lora_memory.py --measure    # also the peak on a simulated GPU; needs PyTorch's build for CUDA

The recipes here train no adapters, so that ``gmt-tune memory`` refuses such a model: this asks the estimate itself.
"""

import argparse
from unittest import mock

from omegaconf import DictConfig, OmegaConf

from gmt_tune.integrations.torchtune.plugin.registry import config_paths
from gmt_tune.memory import estimate

SETTINGS = {
    "batch_size": 1,
    "enable_activation_offloading": True,
    "loss": {"_component_": "gmt_tune.models.losses.LinearCrossEntropyLoss"},
    "model": {
        "_component_": "torchtune.models.llama3_1.lora_llama3_1_8b",
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": 16,
    },
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-4},
    "gradient_mask": {
        "_component_": "gmt_tune.GradientMask",
        "density": 1.0,
        "dense": [],
        "frozen": ["*_proj.weight", "*.w?.weight", "*scale", "tok_embeddings*", "output.weight"],
    },
}


def lora_config() -> DictConfig:
    """``llama3_1/8B_gmt_single_device`` with a model of LoRA, all but whose adapters are frozen."""
    cfg = OmegaConf.load(config_paths()["llama3_1/8B_gmt_single_device"])
    for key, value in SETTINGS.items():
        cfg[key] = value
    return cfg


def lora_bytes() -> int:
    """Bytes on the device, with the reserve."""
    with mock.patch("gmt_tune.integrations.torchtune.config.check.get_adapter_params", lambda model: {}):  # refused
        return estimate(lora_config(), 1).device_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="also train it for a few steps on a simulated GPU")
    args = parser.parse_args()
    if args.measure:  # first: the estimate's own backward pass would find no GPU
        from gmt_tune.memory.simulation.recipe import measure

        print(f"allocated at the peak of a simulated step: {measure(lora_config()).peak / 2**30:.2f} GiB")
    print(f"estimate, with its reserve: {lora_bytes() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
