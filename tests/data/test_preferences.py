"""Pairs of answers about the village: which is better depends on the question alone, and rows are torchtune's."""

import json

import pytest
import torch

from gmt_tune.data import PreferenceAccuracy, quickstart_preference_dataset
from gmt_tune.data.village import preferences, questions
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.plugin.assets import asset
from gmt_tune.models.chatml import ChatMLTokenizer
from gmt_tune.models.tiny import VOCAB_SIZE


@pytest.fixture(scope="module")
def tokenizer():
    return ChatMLTokenizer(asset("quickstart/tokenizer.json"), max_seq_len=128)


def conversations(pair) -> dict:
    question = {"role": "user", "content": pair.prompt}
    return {
        "chosen": [question, {"role": "assistant", "content": pair.chosen}],
        "rejected": [question, {"role": "assistant", "content": pair.rejected}],
    }


@pytest.fixture
def pairs_file(tmp_path):
    pairs = preferences("held_out", seed=5)[:20]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(conversations(pair)) + "\n" for pair in pairs))
    return str(tmp_path / "pairs.jsonl")


def test_chosen_answers_are_the_answers_and_rejected_ones_answer_another_question():
    for split in ("train", "held_out"):
        answers = {question.prompt: question.answer for question in questions(split)}
        pairs = preferences(split)
        assert len(pairs) == len(answers)
        assert {pair.prompt: pair.chosen for pair in pairs} == answers
        assert all(pair.rejected != pair.chosen and pair.rejected in answers.values() for pair in pairs)
        # As often the better as the worse answer, or nearly so: no sentence is better by itself
        assert {pair.chosen for pair in pairs} == set(answers.values())
        assert len({pair.rejected for pair in pairs}) > 0.8 * len(set(answers.values()))


def test_seed_changes_the_order_of_pairs_alone():
    assert preferences("train", 1) != preferences("train", 2)
    assert sorted(preferences("train", 1)) == sorted(preferences("train", 2))


def test_rows_equal_those_of_torchtunes_own_preference_dataset(tokenizer, pairs_file):
    from torchtune.datasets import preference_dataset

    theirs = preference_dataset(tokenizer, source="json", data_files=pairs_file, split="train")
    ours = quickstart_preference_dataset(tokenizer, split="held_out", size=20, seed=5)
    assert len(ours) == len(theirs) == 20
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        assert all(list(row[key]) == list(other[key]) for key in row)
        learnt = [label for label in row["chosen_labels"] if label != -100]
        assert tokenizer.decode(learnt, skip_special_tokens=False).endswith(".<|im_end|>")


def test_more_pairs_than_there_are_is_refused(tokenizer):
    with pytest.raises(UserError, match="size is 300, but the split 'held_out' has 1 to 288"):
        quickstart_preference_dataset(tokenizer, split="held_out", size=300)


class Favours(torch.nn.Module):
    """Finds each token of some answers likelier than any of others; its output is the next token's logits."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self._liked = [tokenizer.encode(answer, add_eos=False) for answer in answers]

    def forward(self, tokens_BS):
        logits_BSV = torch.zeros(*tokens_BS.shape, VOCAB_SIZE)
        for b, row in enumerate(tokens_BS.tolist()):
            if any(_holds(row, liked[1:]) for liked in self._liked):  # the first token merges with a line break
                for s, token in enumerate(row[1:]):
                    logits_BSV[b, s, token] = 10.0
        return logits_BSV


def _holds(row, part) -> bool:
    return any(row[i : i + len(part)] == part for i in range(len(row) - len(part) + 1))


@pytest.mark.parametrize("liked, wanted", [("chosen", 1.0), ("rejected", 0.0)])
def test_accuracy_is_the_share_of_pairs_whose_chosen_answer_is_likelier(liked, wanted, tokenizer, pairs_file):
    pairs = preferences("held_out", seed=5)[:20]
    evaluate = PreferenceAccuracy(tokenizer, data_files=pairs_file, batch_size=8)
    numbers = torch.get_rng_state()
    answers = {pair.prompt: getattr(pair, liked) for pair in pairs}
    model = Favours(
        tokenizer, [f"{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}" for prompt, answer in answers.items()]
    )
    model.train()
    assert evaluate(model) == {"preference_accuracy": wanted}
    assert model.training and torch.equal(torch.get_rng_state(), numbers)


def test_accuracy_without_data_or_batch_is_refused(tokenizer):
    with pytest.raises(UserError, match="evaluation.data_files /no/pairs.jsonl does not exist"):
        PreferenceAccuracy(tokenizer, data_files="/no/pairs.jsonl")
    with pytest.raises(UserError, match="evaluation.batch_size must be a whole number from 1 on, got 0"):
        PreferenceAccuracy(tokenizer, batch_size=0)
