"""Does a method work with gradient accumulation, and with two processes? Each trains a tiny Llama, and is compared.

Both split each batch of a reference in two: so losses must be those of the reference, and after two processes both
must hold the same weights.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from benchmarks.peers.methods import method
from benchmarks.peers.training import make_trainer
from benchmarks.quality.evaluation import IGNORE
from gmt_tune.errors import UserError

BATCH, STEPS, LEARNING_RATE = 8, 12, 3e-3
LOSS_TOLERANCE = 1e-3  # of a loss near 5: far above rounding, far below what another batch gives
_TIMEOUT_S = 900
_WAITED = "it waited in vain for the other process, which had failed"


class _FSDP2OnCPU(Trainer):
    """accelerate takes FSDP up for accelerators alone: here its switch is set for the CPU, its code is its own."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True


def tiny_llama() -> LlamaForCausalLM:
    """The same tiny Llama at each call, with tied embeddings as SmolLM2 has them."""
    torch.manual_seed(11)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def rows() -> list[dict[str, list[int]]]:
    """16 sequences of 12 tokens, of which the last 3 to 6 are labels, again and again."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for answer in torch.randint(3, 7, (16,), generator=generator).tolist():
        tokens = torch.randint(3, 128, (12,), generator=generator).tolist()
        made.append({"input_ids": tokens, "labels": [IGNORE] * (12 - answer) + tokens[-answer:]})
    return made * (BATCH * STEPS // 16)


def train(name: str, folder: Path, *, batch_size: int, accumulate: int = 1, sharded: bool = False) -> dict[str, Any]:
    """Losses of all steps, and the weights after them, whole."""
    arguments: dict[str, Any] = {"ddp_backend": "gloo"} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {}
    if sharded:
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2}}
    trainer = make_trainer(
        method(name), tiny_llama(), rows(), LEARNING_RATE, 0, _FSDP2OnCPU if sharded else Trainer,
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate, **arguments,
    )  # fmt: skip
    trainer.train()
    weights = trainer.model.state_dict()
    if sharded:
        weights = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, "weights": weights}


def run(name: str, kind: str, folder: Path) -> dict[str, Any]:
    """A check.

    Args:
        name: of a method.
        kind: "accumulation" (two micro-batches a step) or "processes" (two, as ``torchrun`` starts them, with gloo).
        folder: for logs.

    Returns:
        ``failed`` (None or the error), ``loss_difference`` (the largest of all steps to the reference), and for
        processes ``ranks_equal`` (whether both hold the same weights).
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reference = _in_processes(1, name, folder / "reference", batch_size=BATCH)
    if kind == "accumulation":
        halves = _in_processes(1, name, folder / kind, batch_size=BATCH // 2, accumulate=2)
    else:
        sharded = method(name).processes == "FSDP2"
        halves = _in_processes(2, name, folder / kind, batch_size=BATCH // 2, sharded=sharded)
    if errors := [part for part in (*reference, *halves) if isinstance(part, str)]:
        return {"failed": min(errors, key=lambda error: error == _WAITED)}
    pairs = zip(reference[0]["losses"], halves[0]["losses"], strict=True)
    result = {"failed": None, "loss_difference": max(abs(one - other) for one, other in pairs)}
    if kind == "processes":
        first, second = (half["weights"] for half in halves)
        result["ranks_equal"] = all(torch.equal(first[key], second[key]) for key in first)
    return result


def _in_processes(count: int, name: str, folder: Path, **options: Any) -> list[Any]:
    """What ``train`` gives in each of some processes, or in its place the error as a text."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_work, args=(rank, count, port, name, folder), kwargs=options) for rank in range(count)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + _TIMEOUT_S
    for process in processes:
        process.join(max(1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    files = [folder / f"{rank}.pt" for rank in range(count)]
    if not any(file.is_file() for file in files):
        raise UserError(f"the check of {name} did not end within {_TIMEOUT_S} s: see {folder}")
    return [torch.load(file) if file.is_file() else _WAITED for file in files]


def _work(rank: int, count: int, port: int, name: str, folder: Path, **options: Any) -> None:
    with open(folder / f"log_{rank}.txt", "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if count > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    torch.set_num_threads(1)
    result: Any
    try:
        result = train(name, folder / f"trainer_{rank}", **options)
    except Exception as error:  # of another's package: it becomes a cell of the table
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    part = folder / f"{rank}.part"
    torch.save(result, part)
    part.rename(folder / f"{rank}.pt")
    if count > 1:
        os._exit(0)  # no waiting for a rank that has failed
