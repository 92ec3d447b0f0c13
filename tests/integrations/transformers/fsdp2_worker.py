"""One process of Trainer runs; ``test_fsdp2.py`` calls it by itself, and starts it twice under torchrun.

    python fsdp2_worker.py OUTPUT_FOLDER RUNS_AS_JSON

where a run is ``{"name": ..., "policy": {...}, "stop_after": step or null, "resume": true or false}``, and may have
``"changes"`` of its training arguments. What refuses a run is written in place of its weights.

Every process gets the same batches, so that the gradients' mean over any number of processes is, bit for bit,
that of one: what differs then between one process and two, the mask did.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from sharded_trainings import StopsAfter, make_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from gmt_tune.integrations.torchtune.process_group import leave
from gmt_tune.integrations.transformers import GradientMaskCallback

BATCH, STEPS, SAVE_STEPS = 4, 5, 3
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


class TrainerWithFSDP2OnCPU(Trainer):
    """accelerate takes FSDP up for accelerators alone: here its switch is set for the CPU, its code is its own.

    Rows come in their order.
    """

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_accelerator_and_postprocess(self):
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # by which transformers 4 asks for FSDP on an accelerator
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                state_dict_type="SHARDED_STATE_DICT",
                cpu_ram_efficient_loading=False,
            )
            self.is_fsdp_enabled = True


def train(
    folder: Path,
    name: str,
    policy: dict,
    stop_after: int | None = None,
    resume: bool = False,
    changes: dict | None = None,
) -> None:
    rows = []
    for tokens in torch.randint(3, 97, (STEPS, BATCH, 12), generator=torch.Generator().manual_seed(3)):
        rows += [{"input_ids": row, "labels": row} for row in tokens] * WORLD_SIZE
    several = {}
    if WORLD_SIZE > 1:
        os.environ["FSDP_VERSION"] = "2"  # for transformers 4, which has no word for it in fsdp_config
        several = {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2}}
    callback = GradientMaskCallback(**policy)
    trainer = TrainerWithFSDP2OnCPU(
        model=make_model(),
        args=TrainingArguments(
            **{
                "output_dir": str(folder / name),
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH,
                "max_grad_norm": 0.0,
                "learning_rate": 1e-2,
                "optim": "adamw_torch",
                "logging_steps": 1,
                "save_steps": SAVE_STEPS,
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                **several,
                **(changes or {}),
            }
        ),
        train_dataset=rows,
        callbacks=[callback, StopsAfter(stop_after)],
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        if trainer.args.process_index == 0:
            torch.save({"refused": str(error)}, folder / f"{name}.pt")
        return
    sharded = isinstance(trainer.model, FSDPModule)
    if sharded:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(trainer.model, options=options)
    else:
        weights = trainer.model.state_dict()
    if trainer.args.process_index == 0:
        result = {
            "weights": weights,
            "selected": {name: int(count) for name, count in callback.mask.statistics.selected.items()},
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            "norms": [log.get("grad_norm") for log in trainer.state.log_history if "loss" in log],
            "sharded": sharded,
        }
        torch.save(result, folder / f"{name}.pt")


def train_all(folder: Path, runs: list[dict]) -> None:
    for run in runs:
        train(folder, **run)


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave()
