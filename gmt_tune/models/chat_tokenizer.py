"""What the tokenizers of all chat models share, over any Hugging Face ``tokenizer.json``.

A model family says how it writes a conversation (``ChatTokenizer`` lists what a subclass may say); ids, loss mask,
truncation and torchtune's interface are here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from torchtune.data import Message

Piece = tuple[str, bool]  # a piece of a conversation's text, and whether it is in the loss

_REMEDIES = {
    "system": "put its text at the beginning of the user's first message, and leave out new_system_prompt",
    "ipython": "write what a tool returned as a user message",
}


class ChatTokenizer:
    """Writes a conversation as a model family does and encodes it, with torchtune's ``ModelTokenizer`` interface.

    The text of the whole conversation is encoded in one go, so the ids are those of a Hugging Face chat template that
    writes the same text, also where a token spans a line break of a header and the first characters of the content.

    A subclass sets the class attributes and overrides ``header``, or what else its family does in another way:

    - ``family`` (str): its name in messages.
    - ``special_tokens_needed`` (tuple[str, ...]): what the format is made of besides those below; default none.
    - ``roles`` (tuple[str, ...] | None): whose messages it takes; None, the default: any, written as it is.
    - ``alternates`` (bool): user and assistant must take turns, the user first, behind a system message if
      ``roles`` has it; default False.
    - ``bos`` (str | None): what a conversation, or an encoded text, begins with; default None, nothing.
    - ``message_end`` (str): the special token that closes a message.
    - ``eos`` (str | None): what an encoded text ends with; default None, ``message_end``.
    - ``pad`` (str): the padding.
    - ``stops`` (tuple[str, ...]): any of which ends a generated answer.
    - ``message_break`` (str): what stands between messages; default a line break.

    Args:
        path (str): the ``tokenizer.json``.
        max_seq_len (int | None): conversations with more tokens are cut to this length; default None, no limit.

    Raises:
        FileNotFoundError: if ``path`` is not a file.
        ValueError: if the file is no tokenizer, lacks one of the special tokens, or ``max_seq_len`` is not positive.
    """

    family: ClassVar[str]
    special_tokens_needed: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[tuple[str, ...] | None] = None
    alternates: ClassVar[bool] = False
    bos: ClassVar[str | None] = None
    message_end: ClassVar[str]
    eos: ClassVar[str | None] = None
    pad: ClassVar[str]
    stops: ClassVar[tuple[str, ...]]
    message_break: ClassVar[str] = "\n"

    def __init__(self, path: str, max_seq_len: int | None = None) -> None:
        if max_seq_len is not None and max_seq_len < 1:
            raise ValueError(f"max_seq_len is {max_seq_len}, but must be a positive number of tokens or null")
        self._tokenizer = _read_tokenizer(Path(path))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items() if token.special}
        of_all = (self.bos, self.eos, self.message_end, self.pad, *self.stops)
        needed = list(dict.fromkeys(token for token in (*self.special_tokens_needed, *of_all) if token is not None))
        missing = [token for token in needed if token not in self.special_tokens]
        if missing:
            raise ValueError(
                f"the tokenizer {path} has no special token {', '.join(missing)}: {self.family} needs "
                f"{_listed(needed)} among its added tokens"
            )
        self._end_id = self.special_tokens[self.message_end]
        self.bos_id = None if self.bos is None else self.special_tokens[self.bos]
        self.eos_id = self.special_tokens[self.eos or self.message_end]
        self.pad_id = self.special_tokens[self.pad]
        self.stop_tokens = [self.special_tokens[token] for token in self.stops]
        self.max_seq_len = max_seq_len
        self._swallowing = {id: token.content for id, token in added.items() if token.lstrip or token.rstrip}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Token ids of plain text, behind ``bos_id`` if there is one and ``add_bos``, before ``eos_id`` if ``add_eos``.

        Special tokens written out in the text become single ids.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if add_eos else ids

    def decode(self, token_ids: Sequence[int], truncate_at_eos: bool = False, skip_special_tokens: bool = True) -> str:
        """Text of token ids, without special tokens if ``skip_special_tokens``.

        With ``truncate_at_eos`` it stops before the first token that closes a message or is ``eos_id``.
        """
        token_ids = list(token_ids)
        if truncate_at_eos:
            ends = (i for i, token in enumerate(token_ids) if token in (self._end_id, self.eos_id))
            token_ids = token_ids[: next(ends, None)]
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def tokenize_messages(
        self, messages: Sequence[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Encode a conversation and say which tokens are left out of the loss.

        The loss is on the content and the closing token of every message whose ``masked`` is False; headers, line
        breaks between messages and a default system message are always left out. A token that holds both a line break
        of the header and the beginning of the content counts as content.

        Args:
            messages (Sequence[Message]): text messages.
            add_end_tokens (bool): False, for generation, ends with an open assistant message: what the model is given
                to answer, and the last message's content if it is the assistant's (empty or the beginning of an
                answer). Default True.

        Returns:
            tuple[list[int], list[bool]]: token ids, and for each, True if it is left out of the loss. With
            more than ``max_seq_len`` tokens both are cut to that length, and if ``add_end_tokens``, the last
            token is the one that closes a message, left out of the loss because the answer did not end there.

        Raises:
            ValueError: if a message holds something other than text, or the family takes no such conversation.
        """
        self.check_messages(messages)
        text, in_loss = self._render(messages, is_open=not add_end_tokens)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = encoding.ids
        mask = []
        for token, (start, end) in zip(tokens, encoding.offsets, strict=True):
            if (content := self._swallowing.get(token)) is not None:
                # A header's last token that takes the answer's leading white space with it is still no answer
                start = text.index(content, start)
                end = start + len(content)
            mask.append(not any(in_loss[start:end]))
        if self.max_seq_len is not None and len(tokens) > self.max_seq_len:
            tokens, mask = tokens[: self.max_seq_len], mask[: self.max_seq_len]
            if add_end_tokens and tokens[-1] != self._end_id:
                tokens[-1], mask[-1] = self._end_id, True
        return tokens, mask

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace a sample's ``messages`` with ``tokens`` and ``mask``, in place; ``inference`` leaves it open."""
        messages = sample.pop("messages")
        sample["tokens"], sample["mask"] = self.tokenize_messages(messages, add_end_tokens=not inference)
        return sample

    def check_messages(self, messages: Sequence[Message]) -> None:
        """Raise a ValueError, one sentence, if the family takes no such conversation."""
        for number, message in enumerate(messages):
            if self.roles is not None and message.role not in self.roles:
                raise ValueError(
                    f"{self.family} takes messages of {_listed(self.roles)} alone, but message {number} has "
                    f"the role {message.role}: {_REMEDIES.get(message.role, 'give it one of these roles')}"
                )
        first = bool(self.alternates and messages and messages[0].role == "system")
        for number, message in enumerate(messages[first:] if self.alternates else ()):
            expected = ("user", "assistant")[number % 2]
            if message.role != expected:
                raise ValueError(
                    f"in a conversation of {self.family} user and assistant take turns, the user first, but message "
                    f"{number + first} has the role {message.role}, not {expected}: join messages of the same role "
                    f"that follow each other"
                )

    def header(self, role: str) -> str:
        """What stands before the content of a message."""
        raise NotImplementedError

    def content(self, text: str) -> str:
        """How the content of a message is written; as it is, if not overridden."""
        return text

    def answer_header(self) -> str:
        """What a prompt ends with, for the model to answer."""
        return self.header("assistant")

    def begun_answer(self, text: str) -> str:
        """How the beginning of an answer is written behind ``answer_header``."""
        return self.content(text)

    def text_of(self, message: Message) -> str:
        """The text of a message; ValueError if it holds something else."""
        other = next((item["type"] for item in message.content if item["type"] != "text"), None)
        if other is not None:
            raise ValueError(
                f"the {message.role} message holds content of type {other}, but {self.family} takes only text"
            )
        return "".join(item["content"] for item in message.content)

    def written(self, messages: Sequence[Message]) -> Iterator[Piece]:
        """The text of closed messages in pieces, without ``bos``, and whether each is in the loss."""
        for message in messages:
            yield from self.closed(self.header(message.role), self.content(self.text_of(message)), not message.masked)

    def closed(self, header: str, content: str, is_in_loss: bool) -> Iterator[Piece]:
        """The pieces of one message."""
        yield header, False
        yield content, is_in_loss
        yield self.message_end, is_in_loss
        yield self.message_break, False

    def _render(self, messages: Sequence[Message], is_open: bool) -> tuple[str, bytes]:
        """The conversation as text and, for each of its characters, 1 if it is in the loss."""
        begun = messages[-1] if is_open and messages and messages[-1].role == "assistant" else None
        pieces = [(self.bos or "", False)]
        if messages:
            pieces.extend(self.written(messages if begun is None else messages[:-1]))
        if is_open:
            pieces.append((self.answer_header(), False))
        if begun is not None:
            pieces.append((self.begun_answer(self.text_of(begun)), not begun.masked))
        text = "".join(piece for piece, _ in pieces)
        return text, b"".join(bytes([is_in_loss]) * len(piece) for piece, is_in_loss in pieces)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


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
