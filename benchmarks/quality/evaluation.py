"""Measures a model's folder: loss and exact match on questions, loss on texts, and how far its weights moved.

The folder is read with transformers, whichever recipe wrote it, so that every method is measured by the same code,
and a key-value cache makes greedy generation affordable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchtune.data import Message

from gmt_tune.data import ExactMatch
from gmt_tune.reporting.weights_reader import Weights

IGNORE = -100


def load_model(folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    """A Hugging Face model from ``model*.safetensors`` alone.

    ``from_pretrained`` would apply the adapter that torchtune's LoRA recipe saves beside the merged weights again.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state: dict[str, torch.Tensor] = {}
    for file in Weights(folder).files:
        state.update(load_file(file))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]:
        raise ValueError(f"{folder} is not the model that its config.json describes: {missing}, {unexpected}")
    model.tie_weights()
    return model.to(device).eval()


class CachedExactMatch(ExactMatch):
    """``ExactMatch`` for a model of transformers, with its key-value cache; numbers compare without separators."""

    @torch.inference_mode()
    def answers(self, model: nn.Module) -> list[str]:
        """The text that ``model`` generates greedily for each of ``self.questions``."""
        prompts = [self._prompt(question) for question in self.questions]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        device = next(model.parameters()).device
        for start in range(0, len(order), self._batch_size):
            indices = order[start : start + self._batch_size]
            tokens_BS, attention_BS = pad_left([prompts[i] for i in indices], self._tokenizer.pad_id)
            generated = model.generate(
                tokens_BS.to(device),
                attention_mask=attention_BS.to(device),
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                eos_token_id=list(self._tokenizer.stop_tokens),
                pad_token_id=self._tokenizer.pad_id,
            )[:, tokens_BS.size(1) :].tolist()
            for i, tokens in zip(indices, generated, strict=True):
                stops = [tokens.index(stop) for stop in self._tokenizer.stop_tokens if stop in tokens]
                answers[i] = self._tokenizer.decode(tokens[: min(stops, default=len(tokens))]).strip()
        return answers

    def _extracted(self, text: str) -> str | None:
        found = super()._extracted(text)
        return found.replace(",", "").rstrip(".") if found is not None and self._extract is not None else found


def pad_left(rows: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask, [batch, sequence], of prompts that all go on from the same position."""
    longest = max(map(len, rows))
    tokens_BS = torch.full((len(rows), longest), filler)
    attention_BS = torch.zeros_like(tokens_BS)
    for row, tokens in enumerate(rows):
        tokens_BS[row, longest - len(tokens) :] = torch.tensor(tokens)
        attention_BS[row, longest - len(tokens) :] = 1
    return tokens_BS, attention_BS


@torch.inference_mode()
def answer_loss(model: nn.Module, tokenizer, rows: Sequence[tuple[str, str]], batch_size: int) -> float:
    """Mean negative log-likelihood, in nats per token, of the answers (and of the token that ends each).

    Args:
        model: of transformers.
        tokenizer: a torchtune ``ModelTokenizer``; what it leaves out of the training loss is left out here.
        rows: questions and answers.
        batch_size: rows at a time.
    """
    encoded = []
    for prompt, answer in rows:
        messages = [Message(role="user", content=prompt, masked=True), Message(role="assistant", content=answer)]
        encoded.append(tokenizer.tokenize_messages(messages))
    encoded.sort(key=lambda pair: len(pair[0]))
    pairs = []
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        longest = max(len(tokens) for tokens, _ in batch)
        tokens_BS = torch.full((len(batch), longest), tokenizer.pad_id)
        labels_BS = torch.full((len(batch), longest), IGNORE)
        for row, (tokens, mask) in enumerate(batch):  # padded on the right: causal attention does not look there
            tokens_BS[row, : len(tokens)] = torch.tensor(tokens)
            labels_BS[row, : len(tokens)] = torch.tensor(tokens).masked_fill(torch.tensor(mask), IGNORE)
        pairs.append((tokens_BS, labels_BS))
    return mean_loss(model, pairs)


@torch.inference_mode()
def text_loss(model: nn.Module, tokenizer, text: str, *, windows: int, window: int, batch_size: int) -> float:
    """Mean negative log-likelihood, in nats per token, of plain text.

    Args:
        model: of transformers.
        tokenizer: with ``encode``.
        text: is cut into windows; ``windows`` of them, evenly spread over it, are read, each by itself.
        window: tokens of each.
        batch_size: windows at a time.
    """
    tokens = torch.tensor(tokenizer.encode(text, add_bos=False, add_eos=False))
    rows = tokens[: len(tokens) // window * window].view(-1, window)
    if len(rows) > windows:
        rows = rows[torch.linspace(0, len(rows) - 1, windows).long()]
    return mean_loss(model, [(batch, batch) for batch in rows.split(batch_size)])


def weight_change(base: Path, tuned: Path) -> dict[str, float]:
    """Fraction of entries that changed, and the change's norm over the base's.

    Compared in fp32, whatever the two are stored in: ``gmt-tune diff`` rounds to the coarser of the two, which would
    hide what an fp32 run did to a bf16 base.
    """
    before, after = Weights(base), Weights(tuned)
    entries = changed = 0
    squares = base_squares = 0.0
    for name in before.tensors.keys() & after.tensors.keys():
        if name.endswith("lm_head.weight") and before.ties_embeddings:
            continue
        for one, other in zip(before.slices(name, 1 << 22), after.slices(name, 1 << 22), strict=True):
            difference = other.float() - one.float()
            entries += difference.numel()
            changed += int(torch.count_nonzero(difference))
            squares += float(difference.square().sum(dtype=torch.float64))
            base_squares += float(one.float().square().sum(dtype=torch.float64))
    relative = (squares / base_squares) ** 0.5
    return {"entries": entries, "fraction_changed": changed / entries, "relative_change": relative}


def evaluate(request: dict) -> dict:
    """All that a request asks for.

    Args:
        request: ``folder`` and ``base`` (folders), ``tokenizer`` (a config section), ``device``, ``dtype``,
            ``batch_size``, ``window``, ``float32_matmul_precision``; ``losses`` (name to JSON Lines file),
            ``exact_match`` (None or keywords of ``ExactMatch``), ``texts`` (name to [text, windows]).

    Returns:
        ``losses`` and ``texts`` by name, ``accuracy`` and ``change``, as far as asked for.
    """
    from omegaconf import OmegaConf
    from torchtune import config

    torch.set_float32_matmul_precision(request["float32_matmul_precision"])
    tokenizer = config.instantiate(OmegaConf.create(request["tokenizer"]))
    model = load_model(Path(request["folder"]), request["device"], getattr(torch, request["dtype"]))
    batch_size = request["batch_size"]
    result: dict = {"losses": {}, "texts": {}}
    for name, file in request["losses"].items():
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]
        pairs = [(row["prompt"], row["answer"]) for row in rows]
        result["losses"][name] = answer_loss(model, tokenizer, pairs, batch_size)
    for name, (text, windows) in request["texts"].items():
        result["texts"][name] = text_loss(
            model, tokenizer, text, windows=windows, window=request["window"], batch_size=batch_size
        )
    if request["exact_match"] is not None:
        asked = CachedExactMatch(tokenizer, **request["exact_match"])
        result["accuracy"] = asked(model)["accuracy"]
        result["questions"] = len(asked.questions)
    if request["base"] is not None:
        result["change"] = weight_change(Path(request["base"]), Path(request["folder"]))
    return result


def mean_loss(model: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Over all labels of [batch, sequence] tokens and labels that are not ``IGNORE``; fp32 losses, fp64 sums."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for tokens_BS, labels_BS in batches:
        hidden_BSD = model.base_model(tokens_BS.to(device), use_cache=False).last_hidden_state[:, :-1]
        labels_BS = labels_BS[:, 1:].to(device)
        wanted = labels_BS != IGNORE
        logits_NV = model.get_output_embeddings()(hidden_BSD[wanted])  # of positions that count alone
        loss = cross_entropy(logits_NV.float(), labels_BS[wanted], reduction="none")
        total += float(loss.sum(dtype=torch.float64))
        count += int(wanted.sum())
    return total / count


def main(request_file: str, result_file: str) -> None:
    """Answer the request in one JSON file with another."""
    result = evaluate(json.loads(Path(request_file).read_text(encoding="utf-8")))
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
