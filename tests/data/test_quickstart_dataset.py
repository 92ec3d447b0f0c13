"""The quickstart's data set gives what torchtune's SFTDataset would, and learns from the answers alone."""

import json

import pytest
import torch

from gmt_tune.data import quickstart_dataset
from gmt_tune.data.village import questions
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.plugin.assets import asset
from gmt_tune.models.chatml import ChatMLTokenizer

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer():
    return ChatMLTokenizer(asset("quickstart/tokenizer.json"), max_seq_len=128)


def test_labels_hold_the_answer_and_its_end_and_nothing_of_the_prompt(tokenizer):
    for row, question in zip(quickstart_dataset(tokenizer), questions("train"), strict=True):
        learnt = [label for label in row["labels"] if label != IGNORED]
        assert tokenizer.decode(learnt, skip_special_tokens=False) == question.answer + "<|im_end|>"
        masked = [token for token, label in zip(row["tokens"], row["labels"], strict=True) if label == IGNORED]
        assert question.prompt in tokenizer.decode(masked) and question.answer not in tokenizer.decode(masked)


def test_rows_equal_those_of_torchtunes_own_sft_dataset(tokenizer, tmp_path):
    from torchtune.datasets import instruct_dataset

    lines = [json.dumps(question._asdict()) + "\n" for question in questions("held_out", seed=5)[:20]]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    theirs = instruct_dataset(
        tokenizer,
        source="json",
        data_files=str(tmp_path / "rows.jsonl"),
        split="train",
        column_map={"input": "prompt", "output": "answer"},
    )
    ours = quickstart_dataset(tokenizer, split="held_out", size=20, seed=5)
    assert len(ours) == len(theirs) == 20
    for row, other in zip(ours, theirs, strict=True):
        assert row["tokens"] == other["tokens"]
        assert list(row["labels"]) == list(other["labels"])


def test_no_row_is_cut_in_the_quickstart(tokenizer):
    assert max(len(row["tokens"]) for row in quickstart_dataset(tokenizer)) < tokenizer.max_seq_len


def test_packed_rows_hold_every_question_once(tokenizer):
    packed = quickstart_dataset(tokenizer, size=40, packed=True)
    rows = quickstart_dataset(tokenizer, size=40)
    labels = torch.cat([pack["labels"] for pack in packed])
    assert (labels == tokenizer.eos_id).sum() == 40
    assert (labels != IGNORED).sum() == sum(label != IGNORED for row in rows for label in row["labels"])
    assert all(len(pack["tokens"]) == 128 for pack in packed)


def test_wrong_size_and_packing_without_a_length_are_refused(tokenizer):
    with pytest.raises(UserError, match="size is 300, but the split 'held_out' has 1 to 288"):
        quickstart_dataset(tokenizer, split="held_out", size=300)
    tokenizer = ChatMLTokenizer(asset("quickstart/tokenizer.json"))
    with pytest.raises(UserError, match="packed: True needs tokenizer.max_seq_len"):
        quickstart_dataset(tokenizer, packed=True)
