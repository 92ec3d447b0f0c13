"""The share of held-out questions that a model answers word for word: a recipe's ``evaluation`` section.

It generates greedily with the model that is being trained, as it is: a torchtune ``TransformerDecoder``,
compiled, sharded or neither. There is no key-value cache, which keeps it short, and slow for long answers.
"""

import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torchtune import utils
from torchtune.data import Message
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from gmt_tune.data.files import rows_of
from gmt_tune.data.quickstart import quickstart_questions
from gmt_tune.data.village import Question, Split
from gmt_tune.errors import UserError

_log = utils.get_logger("INFO")


class ExactMatch:
    """Asks every question, compares the answers, and returns ``{"accuracy": ...}``.

    Without ``data_files`` it asks the quickstart's questions. With it, the rows of your own file: for GSM8K,
    whose answers end in ``#### 42``, set ``prompt_column: question`` and ``extract: "#### (.*)"``.

    Under several processes each must make the same call: all ask every question, in step with each other.

    Args:
        tokenizer (ModelTokenizer): the recipe's tokenizer.
        split (str): of the quickstart's questions, ``held_out`` or ``train``; not used with ``data_files``.
        data_files (str | None): path of a JSON Lines file; default None, the quickstart's questions.
        prompt_column (str): the key of the question in each line of ``data_files``.
        answer_column (str): the key of the answer in each line of ``data_files``.
        extract (str | None): regular expression with one group; the last match in the expected and in the
            generated text is what is compared. Default None, the whole text.
        size (int | None): only the first so many questions; default None, all.
        max_new_tokens (int): an answer that goes on for longer is cut there.
        batch_size (int): questions asked at a time. Memory grows with it, by
            batch_size x tokens x vocabulary x 4 bytes for the outputs alone.
        show (int): how many questions to print with their answers each time.

    Raises:
        UserError: if the data cannot be read, lack a column or an extracted answer, or a number is below 1.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        split: Split = "held_out",
        data_files: str | None = None,
        prompt_column: str = "prompt",
        answer_column: str = "answer",
        extract: str | None = None,
        size: int | None = None,
        max_new_tokens: int = 32,
        batch_size: int = 32,
        show: int = 3,
    ) -> None:
        for key, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"evaluation.{key} must be a whole number from 1 on, got {value}")
        self._tokenizer = tokenizer
        self._extract = _compile(extract)
        if data_files is None:
            self.questions = quickstart_questions(split, size)
            self.name = f"{split} questions"
        else:
            self.questions = _read_questions(Path(data_files), prompt_column, answer_column, size)
            self.name = f"questions of {data_files}"
        for question in self.questions:
            if self._extracted(question.answer) is None:
                raise UserError(f"evaluation.extract {extract!r} finds nothing in the answer {question.answer!r}")
        self._max_new_tokens, self._batch_size, self._show = max_new_tokens, batch_size, show

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Ask all questions; the model's training mode and the state of all random generators stay as they are."""
        asked = list(zip(self.questions, self.answers(model), strict=True))
        right = [self._extracted(answer) == self._extracted(question.answer) for question, answer in asked]
        utils.log_rank_zero(_log, f"{sum(right)} of {len(right)} {self.name} were answered word for word. Such as:")
        for (question, answer), is_right in list(zip(asked, right, strict=True))[: self._show]:
            expected = "right" if is_right else f"expected: {question.answer!r}"
            utils.log_rank_zero(_log, f"  {question.prompt!r} -> {answer!r} ({expected})")
        return {"accuracy": sum(right) / len(right)}

    def answers(self, model: nn.Module) -> list[str]:
        """The text that ``model`` generates for each of ``self.questions``, without surrounding white space."""
        prompts = [self._prompt(question) for question in self.questions]
        # Questions of like length together: less padding. The sort is the same on every rank.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        with evaluating(model):
            for start in range(0, len(order), self._batch_size):
                indices = order[start : start + self._batch_size]
                generated = generate_greedily(
                    model,
                    [prompts[i] for i in indices],
                    max_new_tokens=self._max_new_tokens,
                    stop_tokens=self._tokenizer.stop_tokens,
                    pad_id=self._tokenizer.pad_id,
                )
                for i, tokens in zip(indices, generated, strict=True):
                    answers[i] = self._tokenizer.decode(tokens).strip()
        return answers

    def _prompt(self, question: Question) -> list[int]:
        messages = [Message(role="user", content=question.prompt), Message(role="assistant", content="")]
        return list(self._tokenizer({"messages": messages}, inference=True)["tokens"])

    def _extracted(self, text: str) -> str | None:
        if self._extract is None:
            return text.strip()
        found = self._extract.findall(text)
        return found[-1].strip() if found else None


@torch.no_grad()
def generate_greedily(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    """Go on from each prompt with the likeliest token until it is a stop token; ``pad_id`` is any valid id.

    The model maps tokens [batch, sequence] to logits [batch, sequence, vocabulary], each position depending on those
    before it alone; or to a list of such logits, chunked along the sequence. Prompts have any lengths from 1 on.
    Returns the new token ids of each, without the stop token.
    """
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    # Padded on the right: with causal attention nothing looks there, so no mask and no positions are needed.
    tokens_BS = torch.full((len(prompts), longest + max_new_tokens), pad_id, device=device)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends_B = torch.full_like(lengths_B, -1)
    rows_B = torch.arange(len(prompts), device=device)
    stops = torch.tensor(list(stop_tokens), device=device)

    for step in range(max_new_tokens):
        logits_BSV = model(tokens_BS[:, : longest + step])
        if isinstance(logits_BSV, list):
            logits_BSV = torch.cat(logits_BSV, dim=1)
        next_B = logits_BSV[rows_B, lengths_B - 1].argmax(dim=-1)
        # Rows that have ended go on with tokens that are cut off below: cheaper than to treat them apart.
        tokens_BS[rows_B, lengths_B] = next_B
        ends_B = torch.where((ends_B < 0) & torch.isin(next_B, stops), lengths_B, ends_B)
        lengths_B += 1
        if _all_ranks_agree(ends_B.min() >= 0):
            break

    ends_B = torch.where(ends_B < 0, lengths_B, ends_B)
    return [
        row[len(prompt) : end] for row, prompt, end in zip(tokens_BS.tolist(), prompts, ends_B.tolist(), strict=True)
    ]


def _all_ranks_agree(flag: torch.Tensor) -> bool:
    """Whether a 0-d boolean is true on every rank: a sharded model must be called equally often on all."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


@contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode, and afterwards for every submodule the mode that it was in."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def _compile(extract: str | None) -> re.Pattern | None:
    if extract is None:
        return None
    try:
        pattern = re.compile(extract)
    except re.error as error:
        raise UserError(f"evaluation.extract {extract!r} is no regular expression: {error}") from None
    if pattern.groups != 1:
        raise UserError(f"evaluation.extract {extract!r} must have one group in parentheses, such as '#### (.*)'")
    return pattern


def _read_questions(file: Path, prompt_column: str, answer_column: str, size: int | None) -> list[Question]:
    name = f"evaluation.data_files {file}"
    if not file.is_file():
        raise UserError(f"{name} does not exist: name a JSON Lines file")
    try:
        rows = list(rows_of(file, "json"))
    except UserError as error:
        raise UserError(f"evaluation.data_files: {error}") from None
    for number, row in rows:
        for column in (prompt_column, answer_column):
            if column not in row:
                raise UserError(
                    f"{name} has no {column!r} in line {number}: set evaluation.prompt_column and answer_column to two "
                    f"of {', '.join(row)}"
                )
            if row[column] is None:
                raise UserError(f"{name} has in line {number} the {column} null: fill it in or delete it")
    return [Question(str(row[prompt_column]), str(row[answer_column])) for _, row in rows[:size]]
