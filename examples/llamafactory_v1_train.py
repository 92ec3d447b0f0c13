"""LLaMA-Factory's v1 trainer with a gradient mask, as one of its optimizer plugins.

    pip install llamafactory "gmt-tune[transformers]"
    python llamafactory_v1_train.py config.yaml

The config is one of v1 (``micro_batch_size``, ``train_dataset``, ...), with

    optim_config:
      name: gradient_mask
      lr: 1.0e-5
      weight_decay: 0.0
      density: 0.2            # and what else GradientMask takes
      dense: ["*norm*"]

The mask goes into the checkpoints and is restored from them. Those of ``dist_config: {name: fsdp2}`` leave it out: to
resume from such, keep ``refresh_every`` at 1.
"""

import torch
from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
from llamafactory.v1.trainers.sft_trainer import run_sft

from gmt_tune import GradientMask


@OptimizerPlugin("gradient_mask").register()
def gradient_mask(model: torch.nn.Module, config: dict) -> torch.optim.Optimizer:
    """AdamW whose gradients are masked right before each step."""
    options = {key: value for key, value in config.items() if key not in ("name", "lr", "weight_decay")}
    mask = GradientMask(model.named_parameters(), **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["lr"], weight_decay=config.get("weight_decay", 0.0))
    mask.register(optimizer)

    def restore(_, state: dict) -> None:
        if "gradient_mask" in state:
            mask.load_state_dict(state["gradient_mask"])
        elif mask.refresh_every != 1:
            raise ValueError(
                f"the checkpoint holds no selection of gradient_mask, as FSDP2's do not: with refresh_every: "
                f"{mask.refresh_every}, begin a new run from its weights"
            )

    # Saved and loaded with the optimizer's own state
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "gradient_mask": mask.state_dict()})
    optimizer.register_load_state_dict_pre_hook(restore)
    return optimizer


if __name__ == "__main__":
    run_sft()
