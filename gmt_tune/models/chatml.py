"""A torchtune tokenizer for models that speak ChatML, over any Hugging Face ``tokenizer.json``.

torchtune 0.6.1 ties ChatML to Qwen's own vocabulary files. Here the vocabulary is whatever
``tokenizers.Tokenizer`` reads; this module adds the conversation format and the loss mask, and leaves
the choice of a default system prompt to the model families that use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gmt_tune.models.chat_tokenizer import ChatTokenizer, Piece

if TYPE_CHECKING:
    from torchtune.data import Message

__all__ = ["ChatMLTokenizer"]

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


class ChatMLTokenizer(ChatTokenizer):
    """Renders messages as ChatML and encodes them, with torchtune's ``ModelTokenizer`` interface.

    A conversation becomes, for each message, ``<|im_start|>role\\ncontent<|im_end|>\\n``. The rendered text
    is encoded in one go, so the ids are those of a Hugging Face chat template that writes the same text,
    also where a token spans the header's line break and the first characters of the content.

    The end of a sequence is ``<|im_end|>`` (``eos_id``), which closes every message: none is added at the
    end of a conversation. Padding is ``<|endoftext|>``, so that it cannot be taken for the end of an answer.
    There is no beginning-of-sequence token (``bos_id`` is None).

    Args:
        path (str): the ``tokenizer.json``.
        max_seq_len (int | None): conversations with more tokens are cut to this length; default None, no limit.
        system_prompt (str | None): what the system says when a conversation does not begin with a system
            message; default None, nothing.

    Raises:
        FileNotFoundError: if ``path`` is not a file.
        ValueError: if the file is no tokenizer, lacks one of ChatML's three special tokens, or
            ``max_seq_len`` is not positive.

    Example:
        >>> tokenizer = ChatMLTokenizer("/tmp/SmolLM2-135M-Instruct/tokenizer.json")
        >>> tokens, mask = tokenizer.tokenize_messages(
        ...     [Message(role="user", content="Hi", masked=True), Message(role="assistant", content="Hello!")]
        ... )
        >>> tokenizer.decode([t for t, masked in zip(tokens, mask) if not masked], skip_special_tokens=False)
        'Hello!<|im_end|>'
    """

    family = "ChatML"
    special_tokens_needed = (END_OF_TEXT, IM_START, IM_END)
    message_end = IM_END
    pad = END_OF_TEXT
    stops = (IM_END, END_OF_TEXT)

    def __init__(self, path: str, max_seq_len: int | None = None, system_prompt: str | None = None) -> None:
        super().__init__(path, max_seq_len)
        self.system_prompt = system_prompt

    def header(self, role: str) -> str:
        return f"{IM_START}{role}\n"

    def written(self, messages: Sequence[Message]) -> Iterator[Piece]:
        if self.system_prompt is not None and not (messages and messages[0].role == "system"):
            yield from self.closed(self.header("system"), self.system_prompt, False)
        yield from super().written(messages)
