"""One process of trainings under DeepSpeed; ``test_zero.py`` starts it once and twice under torchrun.

    python zero_worker.py OUTPUT_FOLDER RUNS_AS_JSON

where a run has a "name", a "policy" of the mask, or null for none, a "stage" of ZeRO, or null for no DeepSpeed, and may
have "zero" (more of its section), "changes" of the training arguments, "stop_after" and "resume". With "loop", it is
DeepSpeed's own training loop in place of the Trainer, with "changes" of DeepSpeed's configuration.

Every process gets the same batches, so that the gradients' mean over any number of processes is, bit for bit, that of
one: what differs then between one process and two, the mask did.
"""

import copy
import json
import math
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from accelerate.state import AcceleratorState
from deepspeed.utils import safe_get_full_fp32_param
from sharded_trainings import StopsAfter, make_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from gmt_tune import GradientMask
from gmt_tune.integrations.deepspeed import register
from gmt_tune.integrations.transformers import GradientMaskCallback

BATCH, ACCUMULATION, STEPS, SAVE_STEPS = 2, 2, 5, 3
RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def make_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(3, 97, (STEPS * ACCUMULATION, BATCH, 12), generator=generator))


def weights_of(model) -> dict[str, torch.Tensor]:
    """The weights that the optimizer steps, whole, on every process."""
    full = {}
    for name, p in model.named_parameters():
        weight = safe_get_full_fp32_param(p)
        shape = getattr(p, "ds_shape", p.shape)
        full[name] = (p if weight is None else weight).detach().reshape(shape).clone()
    return full


def config_of(stage: int, zero: dict, **changes) -> dict:
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **changes,
    }


def train(folder: Path, name: str, policy: dict | None, stage: int | None, zero: dict, changes: dict, **stops) -> dict:
    stop_after, resume = stops.get("stop_after"), stops.get("resume", False)
    rows = [{"input_ids": row, "labels": row} for batch in make_batches() for row in [*batch] * WORLD_SIZE]
    callback = None if policy is None else GradientMaskCallback(**{"dense": (), **policy})
    # What a run before left there of its own set-up
    AcceleratorState._reset_state(True)
    under = {}
    if stage is not None:
        auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        bf16 = {"enabled": bool(changes.get("bf16"))}
        under = {"deepspeed": {**config_of(stage, zero), **auto, "gradient_clipping": "auto", "bf16": bf16}}
    args = TrainingArguments(
        **{
            "output_dir": str(folder / name),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 0.5,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,  # two groups: norms and biases are not decayed
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_steps": SAVE_STEPS,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **under,
            **changes,
        }
    )
    trainer = Trainer(
        # Behind the arguments: with stage 3 it is loaded in shards
        model=LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=args,
        train_dataset=rows,
        callbacks=[c for c in (callback, StopsAfter(stop_after)) if c is not None],
    )
    trainer.train(resume_from_checkpoint=resume)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return result_of(trainer.model, None if callback is None else callback.mask) | {
        "losses": [log["loss"] for log in logs],
        "tracked": {name: logs[-1][name] for name in ("mask/overlap", "mask/coverage") if name in logs[-1]},
    }


def loop(folder: Path, name: str, policy: dict, stage: int | None, zero: dict, changes: dict) -> dict:
    """A loop of one's own, around DeepSpeed's engine or around plain PyTorch."""
    model = make_model()
    mask = GradientMask(model.named_parameters(), **{"dense": (), **policy})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if stage is None:
        mask.register(optimizer)
    else:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(stage, zero, **changes))
        handle = register(mask, engine)
    for i, batch in enumerate(make_batches()):
        if stage is None:
            (model(input_ids=batch, labels=batch).loss / ACCUMULATION).backward()
            if (i + 1) % ACCUMULATION == 0:
                optimizer.step()
                optimizer.zero_grad()
        else:
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss * math.nan if name.endswith("poisoned") else loss)
            engine.step()
    if stage is not None:
        handle.remove()
    return result_of(model, mask)


def result_of(model, mask: GradientMask | None) -> dict:
    result = {"weights": weights_of(model)}
    if mask is not None:
        result |= {"selected": mask.statistics.read().selected, "thresholds": mask.statistics.read().thresholds}
    return result


def run_all(folder: Path, runs: list[dict]) -> None:
    if RANK == 0:
        make_model().save_pretrained(folder / "model")
        torch.save(make_model().state_dict(), folder / "before.pt")
    torch.distributed.barrier()
    for run in copy.deepcopy(runs):
        run.setdefault("zero", {})
        run.setdefault("changes", {})
        what = loop if run.pop("loop", False) else train
        try:
            result = what(folder, **run)
        except (ValueError, TypeError, RuntimeError) as error:
            if not run.get("policy"):
                raise
            result = {"refused": str(error)}
        if RANK == 0:
            torch.save(result, folder / f"{run['name']}.pt")


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    run_all(Path(sys.argv[1]), json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()
