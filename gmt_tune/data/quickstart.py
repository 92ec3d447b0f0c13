"""The quickstarts' questions, and pairs of answers to them, as torchtune data sets."""

from torch.utils.data import Dataset
from torchtune.data import ChosenRejectedToMessages, InputOutputToMessages
from torchtune.datasets import PackedDataset, PreferenceDataset, SFTDataset
from torchtune.datasets._sft import SFTTransform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from gmt_tune.data.village import Preference, Question, Split, preferences, questions
from gmt_tune.errors import UserError


def quickstart_dataset(
    tokenizer: ModelTokenizer,
    *,
    split: Split = "train",
    size: int | None = None,
    seed: int = 0,
    packed: bool = False,
) -> Dataset:
    """Questions about the people of a small village, made by the package itself; only the answers are learnt.

    Args:
        tokenizer (ModelTokenizer): turns messages into tokens.
        split (Split): ``train`` (864 questions) or ``held_out`` (288, about people that ``train`` does not name).
        size (int | None): how many questions; default None, all.
        seed (int): which questions, if ``size`` is set, and in which order.
        packed (bool): fill sequences up to the tokenizer's ``max_seq_len`` with several questions.

    Returns:
        Dataset: rows with ``tokens`` and ``labels`` like those of torchtune's ``SFTDataset``, or a ``PackedDataset``.

    Raises:
        UserError: if there is no such split, it has fewer than ``size`` questions, or packing lacks a length.
    """
    asked = quickstart_questions(split, size, seed)
    dataset = _QuestionDataset(asked, tokenizer)
    if not packed:
        return dataset
    if tokenizer.max_seq_len is None:
        raise UserError("packed: True needs tokenizer.max_seq_len, the length of the packed sequences, such as 256")
    return PackedDataset(dataset, max_seq_len=tokenizer.max_seq_len, padding_idx=tokenizer.pad_id)


def quickstart_questions(split: Split, size: int | None = None, seed: int = 0) -> list[Question]:
    """The first ``size`` questions of a split in the order of ``seed``; see ``quickstart_dataset``."""
    return _first(questions(split, seed), split, size)


def quickstart_preference_dataset(
    tokenizer: ModelTokenizer, *, split: Split = "train", size: int | None = None, seed: int = 0
) -> PreferenceDataset:
    """The same questions, each with its answer and a worse one: a true sentence that answers another question.

    Arguments (``tokenizer``, ``split``, ``size``, ``seed``) are those of :func:`quickstart_dataset`;
    rows are those of ``torchtune.datasets.preference_dataset``.
    """
    return _PairDataset(_first(preferences(split, seed), split, size), tokenizer)


def _first(asked: list, split: Split, size: int | None) -> list:
    if size is not None and not 0 < size <= len(asked):
        raise UserError(f"size is {size}, but the split '{split}' has 1 to {len(asked)} questions to give: lower it")
    return asked[:size]


class _QuestionDataset(SFTDataset):
    """Rows from memory instead of from a source that ``datasets.load_dataset`` reads."""

    def __init__(self, asked: list[Question], tokenizer: ModelTokenizer) -> None:
        columns = InputOutputToMessages(column_map={"input": "prompt", "output": "answer"})
        self._prepare_sample = SFTTransform(message_transform=columns, model_transform=tokenizer)
        self._data = [question._asdict() for question in asked]


class _PairDataset(PreferenceDataset):
    """The same for pairs."""

    def __init__(self, pairs: list[Preference], tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._message_transform = ChosenRejectedToMessages()
        self._data = [
            {
                kind: [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": answer}]
                for kind, answer in (("chosen", pair.chosen), ("rejected", pair.rejected))
            }
            for pair in pairs
        ]
