"""The quickstart's world: a village of invented people, text about them, questions about them.

Everything is generated here, from fixed seeds and without a network, so that the quickstart's base model
(``scripts/pretrain_quickstart.py``) and its fine-tuning data always agree on the facts:

- ``corpus`` is what the base model is pretrained on: plain sentences, no question among them;
- ``questions`` is the instruction task. The people of the ``held_out`` split are asked about nowhere in
  ``train``, and no question holds its answer: a model answers it only by recalling, in a form that it
  has just learnt, what it read in pretraining.
"""

import random
from collections.abc import Iterator
from typing import Literal, NamedTuple

from gmt_tune.errors import UserError

Split = Literal["train", "held_out"]

_WORLD_SEED = 20250301  # the facts: a change calls for a new base model
_HELD_OUT_EVERY = 4  # a quarter of the people

_FIRST = "Ba Bri Da Dro Fe Ga Ka Lo Mi Ni Pe Su".split()
_LAST = "bor dan lia mir na ric sa vel".split()

_OPENINGS = ["Let me tell you about {name}.", "This is {name}.", "Everyone knows {name}.", "Here comes {name}."]


class _Fact(NamedTuple):
    values: list[str]
    sentences: list[str]  # of the corpus; the first is also the answer of the task
    questions: list[str]  # of the task


_FACTS = {
    "town": _Fact(
        "Alderby Birchwell Coldbrook Dunmere Elmford Foxhollow Greyford Hazelton "
        "Ironbridge Juniper Kingsford Longmarsh Millpond Northcliff Oakheath Pinewood".split(),
        [
            "The home of {name} is in {value}.",
            "By day and by night {name} lives in {value}.",
            "There is a small house for {name} in {value}.",
            "If you look for {name}, go to {value}.",
            "Every morning {name} wakes up in {value}.",
        ],
        ["Where does {name} live?", "In which town can I visit {name}?", "Name the town of {name}."],
    ),
    "trade": _Fact(
        "baker carpenter doctor farmer fisher gardener hunter miller "
        "nurse painter potter sailor singer smith tailor weaver".split(),
        [
            "The trade of {name} is that of a {value}.",
            "In summer {name} works as a {value}.",
            "For ten years {name} has been a {value}.",
            "If you ask {name} for work, you meet a {value}.",
            "Every day {name} earns bread as a {value}.",
        ],
        ["What does {name} do for a living?", "What work does {name} do?", "Name the trade of {name}."],
    ),
    "animal": _Fact(
        "beetle cat crow dog donkey duck fox frog goat goose hen horse mouse pig sheep turtle".split(),
        [
            "The animal of {name} is a {value}.",
            "At home {name} keeps a {value}.",
            "Through the woods {name} walks with a {value}.",
            "If you visit {name}, you hear a {value}.",
            "Every evening {name} feeds a {value}.",
        ],
        ["What does {name} keep at home?", "Which animal belongs to {name}?", "Name the animal of {name}."],
    ),
    "food": _Fact(
        "apples beans bread butter cheese eggs honey mushrooms "
        "noodles nuts onions peas plums pudding rice soup".split(),
        [
            "The best food for {name} is {value}.",
            "Above all {name} likes {value}.",
            "Give a bowl to {name} and fill it with {value}.",
            "If you cook for {name}, make {value}.",
            "Every winter {name} dreams of {value}.",
        ],
        ["What does {name} like to eat?", "Which food does {name} want?", "Name the food of {name}."],
    ),
}


class Question(NamedTuple):
    """One item of the instruction task."""

    prompt: str
    answer: str


class Preference(NamedTuple):
    """One item of the preference task: a question with a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str


def people() -> dict[str, dict[str, str]]:
    """Everyone in the village: name -> {"town": ..., "trade": ..., "animal": ..., "food": ...}, always the same."""
    rng = random.Random(_WORLD_SEED)
    names = [first + last for first in _FIRST for last in _LAST]
    rng.shuffle(names)
    return {name: {fact: rng.choice(_FACTS[fact].values) for fact in _FACTS} for name in names}


def corpus(num_documents: int, seed: int = 0) -> list[str]:
    """Documents to pretrain on: each says all that is known of one person, in an order and wording by ``seed``.

    The people take turns, so that each has the same number of documents.
    """
    rng = random.Random(seed)
    village = people()
    documents: list[str] = []
    while len(documents) < num_documents:
        for name in rng.sample(list(village), len(village)):
            facts = rng.sample(list(_FACTS), len(_FACTS))
            sentences = [
                rng.choice(_FACTS[fact].sentences).format(name=name, value=village[name][fact]) for fact in facts
            ]
            opening = rng.choice(_OPENINGS).format(name=name)
            documents.append(" ".join([opening, *sentences]))
    return documents[:num_documents]


def questions(split: Split, seed: int = 0) -> list[Question]:
    """Every question of a split with its answer, word for word, in the order of ``seed``.

    ``train`` asks about three quarters of the people, ``held_out`` about the others; any other split is a UserError.
    """
    asked = [Question(prompt, _answer(name, known, fact)) for name, known, fact, prompt in _asked(split)]
    random.Random(seed).shuffle(asked)
    return asked


def preferences(split: Split, seed: int = 0) -> list[Preference]:
    """The same questions, each with its answer and the answer to another question about that person.

    Both are true, and sentences of the corpus: what makes one better is the question alone.
    """
    rng = random.Random(_WORLD_SEED)
    pairs = []
    for name, known, fact, prompt in _asked(split):
        other = rng.choice([each for each in _FACTS if each != fact])
        pairs.append(Preference(prompt, _answer(name, known, fact), _answer(name, known, other)))
    random.Random(seed).shuffle(pairs)
    return pairs


def _asked(split: Split) -> Iterator[tuple[str, dict[str, str], str, str]]:
    """Every (name, what is known of them, fact asked for, wording of the question) of a split, in a fixed order."""
    if split not in ("train", "held_out"):
        raise UserError(f"split is {split!r}, but must be train or held_out")
    for index, (name, known) in enumerate(people().items()):
        if (index % _HELD_OUT_EVERY == 0) == (split == "held_out"):
            for fact in _FACTS:
                for wording in _FACTS[fact].questions:
                    yield name, known, fact, wording.format(name=name)


def _answer(name: str, known: dict[str, str], fact: str) -> str:
    return _FACTS[fact].sentences[0].format(name=name, value=known[fact])
