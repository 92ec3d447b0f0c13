"""The tokenizer of Mistral 7B Instruct v0.3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gmt_tune.models.chat_tokenizer import ChatTokenizer, Piece

if TYPE_CHECKING:
    from torchtune.data import Message

INST, END_INST = "[INST]", "[/INST]"


class MistralV03Tokenizer(ChatTokenizer):
    """Writes a conversation as Mistral 7B Instruct v0.3 does, with torchtune's ``ModelTokenizer`` interface.

    It becomes ``<s>`` and, for each question and its answer, ``[INST] question[/INST] answer</s>``; white space around
    an answer is left out. User and assistant take turns, the user first, behind a system message if there is one.

    The system message is the beginning of the user's last message. The Hugging Face chat template puts it there in a
    prompt, and leaves it out as soon as an answer follows: a model trained on that would not see what it will be given.
    So here a conversation with a system message is the template's prompt for the last answer, and that answer.

    The space before an answer is in the loss, for the model writes it, mostly as part of the answer's first word.

    An answer and plain text end with ``</s>`` (``eos_id``). Padding is ``<unk>``: the release names none.

    Arguments (``path``, ``max_seq_len``) and errors are ``ChatTokenizer``'s.
    """

    family = "Mistral 7B v0.3"
    special_tokens_needed = (INST, END_INST)
    roles = ("system", "user", "assistant")
    alternates = True
    bos, message_end, pad = "<s>", "</s>", "<unk>"
    stops = ("</s>",)

    def answer_header(self) -> str:
        return ""

    def begun_answer(self, text: str) -> str:
        return f" {text.strip()}" if text.strip() else ""

    def written(self, messages: Sequence[Message]) -> Iterator[Piece]:
        last_question = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
        for i, message in enumerate(messages):
            if message.role == "user":
                yield f"{INST} ", False
                if i == last_question and messages[0].role == "system":
                    yield self.text_of(messages[0]) + "\n\n", not messages[0].masked
                yield self.text_of(message) + END_INST, not message.masked
            elif message.role == "assistant":
                yield f" {self.text_of(message).strip()}{self.message_end}", not message.masked


def mistral_v0_3_tokenizer(path: str, max_seq_len: int | None = None) -> MistralV03Tokenizer:
    """The tokenizer of Mistral 7B Instruct v0.3; its ids equal those of its Hugging Face chat template.

    ``MistralV03Tokenizer`` says where a system message goes.

    Args:
        path (str): the model's ``tokenizer.json``.
        max_seq_len (int | None): conversations with more tokens are cut to this length; default None, no limit.
    """
    return MistralV03Tokenizer(path, max_seq_len=max_seq_len)
