"""One training on the Trainer, in a process of its own: what it takes, and how the model is afterwards."""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchtune import config
from torchtune.data import Message
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.methods import Method, method
from benchmarks.quality.evaluation import IGNORE, text_loss
from gmt_tune.masking.optimizers import unwrap_optimizer

_SHARED = {
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,  # not every method's optimizer sees the gradient that would be clipped
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


class Measure(TrainerCallback):
    """Seconds of each step and the bytes that the optimizer holds at the end of a step, at most."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.state_bytes = 0
        self.trainer: Trainer | None = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        optimizer = unwrap_optimizer(optimizer)
        # BAdam's own optimizer drops the states in the step that changes the block, behind that of the one inside
        getattr(optimizer, "base_optimizer", optimizer).register_step_post_hook(self._look)

    def _look(self, optimizer, *arguments) -> None:
        assert self.trainer is not None
        outer = unwrap_optimizer(self.trainer.optimizer)
        masks = [callback.mask for callback in self.trainer.callback_handler.callbacks if hasattr(callback, "mask")]
        held = [optimizer.state, getattr(outer, "param_idx2hp", None), [mask._selections for mask in masks]]
        self.state_bytes = max(self.state_bytes, held_bytes(held))

    def on_step_begin(self, *arguments, **kwargs) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, *arguments, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._start[0])
        self.cpu_seconds.append(time.process_time() - self._start[1])


def held_bytes(held: Any) -> int:
    """Bytes of the tensors within containers and objects, each memory counted once."""
    sizes: dict[int, int] = {}
    seen: dict[int, Any] = {}  # keeps what it holds alive, so that no other object gets its id

    def look(item: Any) -> None:
        if isinstance(item, Tensor):
            if hasattr(item, "__tensor_flatten__"):
                look([getattr(item, name) for name in item.__tensor_flatten__()[0]])
            else:
                storage = item.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (str, bytes, int, float, bool, type(None), nn.Module, type)) or id(item) in seen:
            pass
        else:
            seen[id(item)] = item
            if isinstance(item, Mapping):
                look(list(item.values()))
            elif isinstance(item, (list, tuple)):
                for part in item:
                    look(part)
            else:
                look(list(getattr(item, "__dict__", {}).values()))
                look([getattr(item, name, None) for name in getattr(type(item), "__slots__", ())])

    look(held)
    return sum(sizes.values())


def collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
    """A batch that is padded on the left, so that the logits of all answers are the last ones, and no others are made.

    Args:
        rows: ``input_ids`` and ``labels``, of equal length; labels are ``IGNORE`` but for the answer.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    kept = max(len(row["labels"]) - first_label(row["labels"]) for row in rows)
    pad = lambda values, filler: [filler] * (longest - len(values)) + values  # noqa: E731
    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], IGNORE)[-kept - 1 :] for row in rows]),
        "logits_to_keep": kept + 1,
    }


def first_label(labels: list[int]) -> int:
    """The index of the first label that counts."""
    return next(i for i, label in enumerate(labels) if label != IGNORE)


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """Sum of the negative log-likelihoods of a batch's labels over the number of labels of the whole step.

    Args:
        outputs: with logits of [batch, labels, vocabulary].
        labels: [batch, labels]; the first ones have no logits before them, and count for nothing.
        num_items_in_batch: labels that count, of all micro-batches and processes of the step.
    """
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    return cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum") / num_items_in_batch


def make_trainer(
    of: Method,
    model: nn.Module,
    rows: Sequence[Mapping[str, list[int]]],
    rate: float,
    seed: int,
    trainer_class: type[Trainer] = Trainer,
    **arguments: Any,
) -> Trainer:
    """A Trainer that trains a model by a method, on the rows in their order."""
    setup = of.set_up(model, rate, seed, **of.options)
    return trainer_class(
        model=setup.model,
        args=TrainingArguments(
            **{**_SHARED, "learning_rate": rate, "seed": seed, **arguments, **setup.arguments},
        ),
        data_collator=collate,
        train_dataset=list(rows),
        compute_loss_func=answer_loss,
        callbacks=list(setup.callbacks),
        optimizers=(setup.optimizer, None),
    )


def train(request: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], nn.Module]:
    """Train as asked.

    Args:
        request: ``method``, ``model`` (a folder), ``rows`` (a JSON Lines file), ``learning_rate``, ``seed``,
            ``arguments`` (of TrainingArguments) and ``imports`` (modules).
        folder: for what a Trainer writes.

    Returns:
        ``train_loss`` of each step, ``seconds_per_step`` and ``cpu_seconds_per_step`` (medians), ``peak_memory_bytes``
        (highest resident memory from the model's loading to the last step, less what there was before)
        and ``state_bytes``; and the model, merged where it had adapters.
    """
    for name in request["imports"]:
        __import__(name)
    rows = [json.loads(line) for line in Path(request["rows"]).read_text(encoding="utf-8").splitlines()]
    before = _resident("VmRSS")
    model = load(request["model"]).train()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory is counted from here on
    trainer = make_trainer(
        method(request["method"]), model, rows, request["learning_rate"], request["seed"],
        output_dir=str(folder / "trainer"), **request["arguments"],
    )  # fmt: skip
    measure = Measure()
    measure.trainer = trainer
    trainer.add_callback(measure)
    trainer.train()
    result = {
        "train_loss": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "seconds_per_step": statistics.median(measure.seconds),
        "cpu_seconds_per_step": statistics.median(measure.cpu_seconds),
        "cpu_seconds": sum(measure.cpu_seconds),
        "peak_memory_bytes": _resident("VmHWM") - before,
        "state_bytes": measure.state_bytes,
    }
    trained = trainer.model
    if hasattr(trained, "merge_and_unload"):
        trained = trained.merge_and_unload()
    return result, trained


def load(folder: str) -> nn.Module:
    """A model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def evaluate(request: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Losses and accuracy on questions, losses on texts.

    Args:
        model: that is evaluated.
        request: ``tokenizer`` (a config section), ``batch_size``, ``window``, ``questions`` (name to JSON Lines file)
            and ``texts`` (name to [text, windows]).

    Returns:
        ``losses`` and ``accuracies`` by name of questions, and losses of ``texts``.
    """
    tokenizer = config.instantiate(OmegaConf.create(request["tokenizer"]))
    model.eval()
    result: dict[str, Any] = {"losses": {}, "accuracies": {}, "texts": {}}
    for name, file in request["questions"].items():
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        encoded = [encode(tokenizer, row["prompt"], row["answer"]) for row in rows]
        result["losses"][name], result["accuracies"][name] = answered(model, encoded, request["batch_size"])
    for name, (text, windows) in request["texts"].items():
        result["texts"][name] = text_loss(
            model, tokenizer, text, windows=windows, window=request["window"], batch_size=request["batch_size"]
        )
    return result


def encode(tokenizer: Any, prompt: str, answer: str) -> dict[str, list[int]]:
    """A row for ``collate``, of a question and its answer."""
    messages = [Message(role="user", content=prompt, masked=True), Message(role="assistant", content=answer)]
    tokens, mask = tokenizer.tokenize_messages(messages)
    labels = [IGNORE if masked else token for token, masked in zip(tokens, mask, strict=True)]
    return {"input_ids": tokens, "labels": labels}


@torch.inference_mode()
def answered(model: nn.Module, rows: Sequence[Mapping[str, list[int]]], batch_size: int) -> tuple[float, float]:
    """Mean loss in nats a token, and the fraction of answers that greedy decoding would give.

    That are those of which each token, the one that ends it included, is the most probable one.
    """
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    total, count, right = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size])
        labels = batch.pop("labels")
        outputs = model(**batch, use_cache=False)
        wanted = labels[:, 1:] != IGNORE
        total += float(answer_loss(outputs, labels, 1))
        count += int(wanted.sum())
        right += int(((outputs.logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~wanted).all(1).sum())
    return total / count, right / len(rows)


def main(request_file: str, result_file: str, log_file: str) -> None:
    """Answer the request in one JSON file with another; ``failed`` is what a training ended with, if it did not end."""
    with open(log_file, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    result: dict[str, Any] = {"failed": None}
    torch.set_num_threads(1)
    try:
        if request["train"] is None:
            model = load(request["model"])
        else:
            taken, model = train(request["train"] | {"model": request["model"]}, Path(request_file).parent)
            result |= taken
        result |= evaluate(request["evaluation"], model)
    except Exception as error:  # of another's package: it becomes a row
        traceback.print_exc()
        result["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")
