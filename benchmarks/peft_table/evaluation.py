"""What the comparison measures of a trained model, in a process of its own: answers right, and what was forgotten."""

from __future__ import annotations

import json
import sys
import time
from decimal import Decimal
from pathlib import Path

import torch
from torch import nn

from benchmarks.peft_table.data import prompt
from benchmarks.quality.evaluation import IGNORE, load_model, mean_loss, pad_left, weight_change

MAX_NEW_TOKENS = 300
QUESTIONS_AT_A_TIME = 50
TEXTS_AT_A_TIME = 4
LONGEST_TEXT = 768  # tokens

# What an answer stands behind. The first of these that a text has counts, at its last place.
_MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def final_answer(text: str) -> float | str | None:
    """The answer at the end of a text: a number where it is one (a fraction too), else its characters.

    None if nothing in the text says that an answer follows.
    """
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in _MARKS if mark in text), None)
    if mark is None:
        return None
    answer = text.rpartition(mark)[2].strip().partition("\n")[0].strip(" .!?$%")
    try:
        numerator, _, denominator = answer.partition("/")
        return float(Decimal(numerator.strip()) / Decimal(denominator.strip() if "/" in answer else 1))
    except ArithmeticError:  # of decimal: no number, or a fraction of zero
        return answer


def accuracy(model: nn.Module, tokenizer, rows: list[dict]) -> float:
    """The share of questions whose final answer is right, generated as ``model.generation_config`` says."""
    right = 0
    for start in range(0, len(rows), QUESTIONS_AT_A_TIME):
        batch = rows[start : start + QUESTIONS_AT_A_TIME]
        for row, text in zip(
            batch, _generated(model, tokenizer, [prompt(row["question"]) for row in batch]), strict=True
        ):
            answer = final_answer(text)
            right += answer is not None and answer == final_answer(row["answer"])
    return right / len(rows)


@torch.inference_mode()
def _generated(model: nn.Module, tokenizer, prompts: list[str]) -> list[str]:
    """Each prompt and what the model adds, as text."""
    encoded = [tokenizer.encode(text, add_bos=True, add_eos=False) for text in prompts]
    tokens_BS, attention_BS = pad_left(encoded, tokenizer.eos_id)
    generated_BS = model.generate(
        tokens_BS.to(model.device),
        attention_mask=attention_BS.to(model.device),
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
    )
    answers = []
    for text, tokens in zip(prompts, generated_BS[:, tokens_BS.size(1) :].tolist(), strict=True):
        end = tokens.index(tokenizer.eos_id) if tokenizer.eos_id in tokens else len(tokens)
        answers.append(text + tokenizer.decode(tokens[:end]))
    return answers


@torch.inference_mode()
def text_loss(model: nn.Module, tokenizer, texts: list[str]) -> float:
    """Mean negative log-likelihood, in nats per token, of the beginnings of texts."""
    pairs = []
    encoded = [tokenizer.encode(text, add_bos=True, add_eos=False)[:LONGEST_TEXT] for text in texts]
    for start in range(0, len(encoded), TEXTS_AT_A_TIME):
        batch = encoded[start : start + TEXTS_AT_A_TIME]
        tokens_BS = torch.full((len(batch), max(map(len, batch))), tokenizer.pad_id)
        labels_BS = torch.full_like(tokens_BS, IGNORE)
        for row, tokens in enumerate(batch):  # padded on the right: causal attention does not look there
            tokens_BS[row, : len(tokens)] = labels_BS[row, : len(tokens)] = torch.tensor(tokens)
        pairs.append((tokens_BS, labels_BS))
    return mean_loss(model, pairs)


def evaluate(request: dict) -> dict:
    """Measure a trained model.

    Args:
        request: ``folder`` and ``base`` (folders of models), ``tokenizer`` (a config section), ``device``, ``dtype``,
            ``seed``; ``validation``, ``test`` and ``wikipedia`` (JSON Lines files).

    Returns:
        ``valid accuracy`` and ``test accuracy`` as the base model's ``generation_config.json`` generates;
        ``test accuracy, greedy``, the same if that does not ask for sampling; ``forgetting``, the rise of the loss on
        the texts; ``num_total_params`` and ``bytes of a parameter``; ``change``, of ``weight_change``; ``seconds``,
        of what the comparison counts as training time; ``memory``, the most that was reserved on the device, in bytes.
    """
    from omegaconf import OmegaConf
    from torchtune import config
    from transformers import GenerationConfig

    base, device, dtype = Path(request["base"]), request["device"], getattr(torch, request["dtype"])
    tokenizer = config.instantiate(OmegaConf.create(request["tokenizer"]))
    texts = [row["text"] for row in _rows(request["wikipedia"])]

    start = time.perf_counter()
    model = load_model(base, device, dtype)
    loss_before = text_loss(model, tokenizer, texts)
    del model
    model = load_model(Path(request["folder"]), device, dtype)
    forgetting = text_loss(model, tokenizer, texts) - loss_before

    has_settings = (base / "generation_config.json").is_file()
    greedy = GenerationConfig(do_sample=False)
    model.generation_config = GenerationConfig.from_pretrained(base) if has_settings else greedy
    torch.manual_seed(request["seed"])
    test = _rows(request["test"])
    right = accuracy(model, tokenizer, test)
    seconds = time.perf_counter() - start

    result = {"valid accuracy": accuracy(model, tokenizer, _rows(request["validation"]))}
    samples, model.generation_config = model.generation_config.do_sample, greedy
    return result | {
        "test accuracy": right,
        "test accuracy, greedy": accuracy(model, tokenizer, test) if samples else right,
        "forgetting": forgetting,
        "num_total_params": sum(parameter.numel() for parameter in model.parameters()),
        "bytes of a parameter": next(model.parameters()).element_size(),
        "change": weight_change(base, Path(request["folder"])),
        "seconds": seconds,
        "memory": torch.cuda.max_memory_reserved() if device.startswith("cuda") else 0,
    }


def _rows(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]


def main(request_file: str, result_file: str) -> None:
    """Answer the request in one JSON file with another."""
    result = evaluate(json.loads(Path(request_file).read_text(encoding="utf-8")))
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
