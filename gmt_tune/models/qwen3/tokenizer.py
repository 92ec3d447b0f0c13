"""The tokenizer of the Qwen 3 models, which think before they answer or do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gmt_tune.models.chat_tokenizer import Piece
from gmt_tune.models.chatml import ChatMLTokenizer

if TYPE_CHECKING:
    from torchtune.data import Message

THINK, END_THINK = "<think>", "</think>"
NO_THOUGHT = f"{THINK}\n\n{END_THINK}\n\n"


class Qwen3Tokenizer(ChatMLTokenizer):
    """ChatML as Qwen 3 writes it, with the reasoning of the last answer between ``<think>`` and ``</think>``.

    The data hold reasoning as the model writes it, at the beginning of an answer's content:
    ``<think>\\nreasoning\\n</think>\\n\\nanswer``. As in the Hugging Face chat template,

    - the reasoning of answers before the last question is left out: the model does not see it again, so it is not
      learnt there;
    - the last answer always has the two marks, with nothing between them if it has no reasoning;
    - line breaks around the reasoning, and before the answer behind it, are what the template makes them.

    What is in the loss:

    - Reasoning, with its two marks and the answer behind it: the model writes all of it.
    - Of an answer without reasoning, the answer alone. The empty marks are what ``enable_thinking=False`` gives the
      model in the prompt, so they are left out.

    So in a conversation of several turns, earlier answers are learnt right behind the header, as if the model had
    chosen not to think. If it is to go on thinking, give each answer a conversation of its own, or leave earlier
    answers out of the loss (``masked``).

    ``enable_thinking`` changes prompts alone, as in transformers: with True the model is left to begin with
    ``<think>``, with False the prompt ends with the empty marks. Set it to False for data without reasoning, so that a
    recipe's evaluation asks in the way that was learnt.

    The releases of July 2025, with ``-2507`` in their names, have templates of their own, which this is not.

    There is no default system message. What a tool returned is written as a user message that begins with
    ``<tool_response>`` and ends with ``</tool_response>``: it is no new question, so reasoning before it stays.

    Args:
        path (str): the model's ``tokenizer.json``.
        max_seq_len (int | None): conversations with more tokens are cut to this length; default None, no limit.
        enable_thinking (bool): whether prompts leave it to the model to think; default True.

    Raises:
        FileNotFoundError: if ``path`` is not a file.
        ValueError: if the file is no tokenizer, lacks one of ChatML's three special tokens, or
            ``max_seq_len`` is not positive.
    """

    family = "Qwen 3"
    roles = ("system", "user", "assistant")

    def __init__(self, path: str, max_seq_len: int | None = None, enable_thinking: bool = True) -> None:
        super().__init__(path, max_seq_len)
        self.enable_thinking = enable_thinking

    def answer_header(self) -> str:
        return self.header("assistant") + ("" if self.enable_thinking else NO_THOUGHT)

    def written(self, messages: Sequence[Message]) -> Iterator[Piece]:
        texts = [self.text_of(message) for message in messages]
        questions = [
            i
            for i, (message, text) in enumerate(zip(messages, texts, strict=True))
            if message.role == "user" and not (text.startswith("<tool_response>") and text.endswith("</tool_response>"))
        ]
        last = len(messages) - 1
        last_question = questions[-1] if questions else last
        for i, (message, text) in enumerate(zip(messages, texts, strict=True)):
            header, reasoning = self.header(message.role), ""
            if message.role == "assistant":
                reasoning, text = _split(text)
                if i > last_question and reasoning:
                    text = f"{THINK}\n{reasoning}\n{END_THINK}\n\n" + text.lstrip("\n")
                elif i > last_question and i == last:
                    header, text = header + NO_THOUGHT, text.lstrip("\n")
            yield from self.closed(header, text, not message.masked)


def qwen3_tokenizer(path: str, max_seq_len: int | None = None, enable_thinking: bool = True) -> Qwen3Tokenizer:
    """The tokenizer of the Qwen 3 models; its ids equal those of their Hugging Face chat template.

    ``Qwen3Tokenizer`` says what of an answer's reasoning is in the loss.

    Args:
        path (str): the model's ``tokenizer.json``.
        max_seq_len (int | None): conversations with more tokens are cut to this length; default None, no limit.
        enable_thinking (bool): whether prompts leave it to the model to think; default True. Set it to False for
            data without reasoning.
    """
    return Qwen3Tokenizer(path, max_seq_len=max_seq_len, enable_thinking=enable_thinking)


def _split(text: str) -> tuple[str, str]:
    """The reasoning of an answer, empty if it has none, and what comes behind it."""
    if END_THINK not in text:
        return "", text
    reasoning = text.split(END_THINK)[0].rstrip("\n").split(THINK)[-1].lstrip("\n")
    return reasoning, text.split(END_THINK)[-1].lstrip("\n")
