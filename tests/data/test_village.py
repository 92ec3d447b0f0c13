"""The invented village: always the same facts, and no way to answer a held-out question from the training set."""

import hashlib

import pytest

from gmt_tune.data.village import corpus, people, questions
from gmt_tune.errors import UserError


def digest(lines) -> str:
    return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()[:16]


def test_facts_are_those_that_the_packaged_model_has_read():
    # Written down once, so that they also say that no process and no Python differs. A new digest calls for a new
    # base model: scripts/pretrain_quickstart.py
    assert digest(people().items()) == "203bf08cc392caad"
    assert digest(corpus(200)) == "2ea116665b890178"


def test_seed_changes_wording_and_order_but_no_fact():
    assert corpus(5, seed=1) != corpus(5, seed=2)
    first, second = questions("train", seed=1), questions("train", seed=2)
    assert first != second and sorted(first) == sorted(second)


def test_train_and_held_out_share_no_person_and_no_prompt():
    def asked_about(split):
        return {name for name in people() for question in questions(split) if name in question.prompt}

    assert asked_about("train").isdisjoint(asked_about("held_out"))
    assert asked_about("train") | asked_about("held_out") == set(people())
    assert {q.prompt for q in questions("train")}.isdisjoint(q.prompt for q in questions("held_out"))
    assert (len(questions("train")), len(questions("held_out"))) == (864, 288)


def test_no_name_is_part_of_another():
    names = list(people())
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_answers_are_true_and_not_in_the_prompt():
    village = people()
    for split in ("train", "held_out"):
        for question in questions(split):
            (name,) = (name for name in village if name in question.prompt)
            (fact,) = (value for value in village[name].values() if question.answer.endswith(f" {value}."))
            assert name in question.answer and fact not in question.prompt


def test_corpus_tells_every_fact_equally_often_and_asks_nothing():
    village = people()
    documents = corpus(3 * len(village))
    for name, known in village.items():
        about = [document for document in documents if f" {name}" in document]
        assert len(about) == 3
        assert all(f" {value}" in document for document in about for value in known.values())
    assert not any("?" in document for document in documents)


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="split is 'test', but must be train or held_out"):
        questions("test")
