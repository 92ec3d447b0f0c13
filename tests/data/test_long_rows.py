"""What docs/data.md says of rows that are too long, and of packs: by the tokenizer and data sets that recipes build."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.plugin.assets import asset
from gmt_tune.integrations.torchtune.run.data import build_dataset
from gmt_tune.models.chatml import ChatMLTokenizer

QUESTIONS = [f"Who is number {n}?" for n in range(6)]
ANSWERS = [f"Number {n} is the {'very ' * n}first." for n in range(6)]


@pytest.fixture
def build(tmp_path):
    """Function from the length at which rows are cut, and further keys of the section, to a data set of six rows."""

    def build(max_seq_len: int | None, **keys):
        rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = {
            "_component_": "torchtune.datasets.instruct_dataset",
            "source": "json",
            "data_files": str(tmp_path / "rows.jsonl"),
            "column_map": {"input": "question", "output": "answer"},
            **keys,
        }
        tokenizer = ChatMLTokenizer(asset("quickstart/tokenizer.json"), max_seq_len=max_seq_len)
        return build_dataset(OmegaConf.create(section), tokenizer)[0]

    return build


def learnt(row) -> list[int]:
    return [int(label) for label in row["labels"] if label >= 0]


def test_an_answer_that_is_cut_is_learnt_as_far_as_it_goes(build):
    whole = build(None)[5]
    cut_at = len(whole["tokens"]) - 4
    row = build(cut_at)[5]
    assert len(row["tokens"]) == len(row["labels"]) == cut_at
    assert learnt(row) == learnt(whole)[:-4]  # and no token that closes it


def test_of_an_answer_that_is_cut_off_nothing_is_learnt(build):
    whole = build(None)[5]
    before = next(i for i, label in enumerate(whole["labels"]) if label >= 0)
    row = build(before - 2)[5]
    assert len(row["tokens"]) == before - 2 and learnt(row) == []


def test_packs_hold_several_rows_in_the_files_order(build):
    packs, rows = build(96, packed=True), build(96)
    assert 1 < len(packs) < len(rows) and {len(pack["tokens"]) for pack in packs} == {96}
    assert [label for pack in packs for label in learnt(pack)] == [label for row in rows for label in learnt(row)]
    first = packs[0]
    lengths = [len(rows[i]["tokens"]) for i in range(2)]
    assert first["tokens"][: sum(lengths)].tolist() == rows[0]["tokens"] + rows[1]["tokens"]
    # Positions begin again with each row, which the attention's mask keeps apart
    assert first["input_pos"][: sum(lengths)].tolist() == [*range(lengths[0]), *range(lengths[1])]
    assert torch.equal(first["seq_lens"][:2], torch.tensor(lengths))


def test_pairs_are_not_packed(build, tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pair = {"chosen": messages, "rejected": [messages[0], {**messages[1], "content": "b"}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    component = "torchtune.datasets.preference_dataset"
    with pytest.raises(UserError, match="Packed is currently not supported for preference datasets"):
        build(96, _component_=component, data_files=str(tmp_path / "pairs.jsonl"), column_map=None, packed=True)
