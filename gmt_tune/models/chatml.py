"""A torchtune tokenizer for models that speak ChatML, over any Hugging Face ``tokenizer.json``.

torchtune 0.6.1 ties ChatML to Qwen's own vocabulary files. Here the vocabulary is whatever
``tokenizers.Tokenizer`` reads; this module adds the conversation format and the loss mask, and leaves
the choice of a default system prompt to the model families that use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from torchtune.data import Message

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


class ChatMLTokenizer:
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

    bos_id = None

    def __init__(self, path: str, max_seq_len: int | None = None, system_prompt: str | None = None) -> None:
        if max_seq_len is not None and max_seq_len < 1:
            raise ValueError(f"max_seq_len is {max_seq_len}, but must be a positive number of tokens or null")
        self._tokenizer = _read_tokenizer(Path(path))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items() if token.special}
        missing = [token for token in (END_OF_TEXT, IM_START, IM_END) if token not in self.special_tokens]
        if missing:
            raise ValueError(
                f"the tokenizer {path} has no special token {', '.join(missing)}: ChatML needs "
                f"{END_OF_TEXT}, {IM_START} and {IM_END} among its added tokens"
            )
        self.eos_id = self.special_tokens[IM_END]
        self.pad_id = self.special_tokens[END_OF_TEXT]
        self.stop_tokens = [self.eos_id, self.pad_id]
        self.max_seq_len = max_seq_len
        self.system_prompt = system_prompt

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Token ids of plain text, ``<|im_end|>`` at their end if ``add_eos``. Special tokens written out in it become
        single ids. ``add_bos`` is there for torchtune's interface: ChatML has no such token, and none is added.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*ids, self.eos_id] if add_eos else ids

    def decode(self, token_ids: Sequence[int], truncate_at_eos: bool = False, skip_special_tokens: bool = True) -> str:
        """Text of token ids, without special tokens if ``skip_special_tokens``.

        With ``truncate_at_eos`` it stops before the first ``<|im_end|>``, the end of a conversation's first message.
        """
        token_ids = list(token_ids)
        if truncate_at_eos and self.eos_id in token_ids:
            token_ids = token_ids[: token_ids.index(self.eos_id)]
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def tokenize_messages(
        self, messages: Sequence[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Encode a conversation and say which tokens are left out of the loss.

        The loss is on the content and the closing ``<|im_end|>`` of every message whose ``masked`` is False;
        headers, line breaks between messages and the default system message are always left out. A token
        that holds both a line break of the header and the beginning of the content counts as content.

        Args:
            messages (Sequence[Message]): text messages; each role is written as it is.
            add_end_tokens (bool): False, for generation, ends with an open assistant message: the last
                message's content if it is the assistant's (empty or the beginning of an answer), else
                ``<|im_start|>assistant\\n``. Default True.

        Returns:
            tuple[list[int], list[bool]]: token ids, and for each, True if it is left out of the loss. With
            more than ``max_seq_len`` tokens both are cut to that length, and if ``add_end_tokens``, the last
            token is ``<|im_end|>``, left out of the loss because the answer did not end there.

        Raises:
            ValueError: if a message holds something other than text.
        """
        text, in_loss = self._render(messages, is_open=not add_end_tokens)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = encoding.ids
        mask = [not any(in_loss[start:end]) for start, end in encoding.offsets]
        if self.max_seq_len is not None and len(tokens) > self.max_seq_len:
            tokens, mask = tokens[: self.max_seq_len], mask[: self.max_seq_len]
            if add_end_tokens and tokens[-1] != self.eos_id:
                tokens[-1], mask[-1] = self.eos_id, True
        return tokens, mask

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace a sample's ``messages`` with ``tokens`` and ``mask``, in place; ``inference`` leaves it open."""
        messages = sample.pop("messages")
        sample["tokens"], sample["mask"] = self.tokenize_messages(messages, add_end_tokens=not inference)
        return sample

    def _render(self, messages: Sequence[Message], is_open: bool) -> tuple[str, bytearray]:
        """The conversation as text and, for each of its characters, 1 if it is in the loss."""
        text, in_loss = [], bytearray()

        def write(piece: str, is_in_loss: bool = False) -> None:
            text.append(piece)
            in_loss.extend(bytes([is_in_loss]) * len(piece))

        if self.system_prompt is not None and messages and messages[0].role != "system":
            write(f"{IM_START}system\n{self.system_prompt}{IM_END}\n")
        for i, message in enumerate(messages):
            write(f"{IM_START}{message.role}\n")
            write(_text_of(message), not message.masked)
            if is_open and i == len(messages) - 1 and message.role == "assistant":
                return "".join(text), in_loss
            write(IM_END, not message.masked)
            write("\n")
        if is_open:
            write(f"{IM_START}assistant\n")
        return "".join(text), in_loss


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"the tokenizer file {path} does not exist: give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust extension raises nothing more specific
        raise ValueError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
    # Such files may carry settings of the run that saved them; lengths are torchtune's business here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A post-processor adds special tokens, which are written out here, or trims white space off the offsets that the
    # loss mask is read from (GPT-2, RoBERTa and StarCoder do): that white space would not be learnt.
    tokenizer.post_processor = None
    return tokenizer


def _text_of(message: Message) -> str:
    other = next((item["type"] for item in message.content if item["type"] != "text"), None)
    if other is not None:
        raise ValueError(f"a message of the {message.role} holds content of type {other}, but ChatML takes only text")
    return "".join(item["content"] for item in message.content)
