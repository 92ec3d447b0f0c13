"""Wrong rows and files are named, with what is wrong with them, before training where that costs little."""

import json
import traceback
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_gguf import tiny_tokenizer
from torch.utils.data import Dataset
from torchtune.datasets import ConcatDataset, PackedDataset, SFTDataset

from gmt_tune.data.preference_accuracy import PreferenceAccuracy
from gmt_tune.data.rows import CheckedRows, rows_of_pack
from gmt_tune.errors import UserError, UserErrorOfOneRank
from gmt_tune.integrations.torchtune.run.data import build_dataset
from gmt_tune.models.chatml import ChatMLTokenizer

INSTRUCT = {
    "_component_": "torchtune.datasets.instruct_dataset",
    "column_map": {"input": "question", "output": "answer"},
}
CHAT = {
    "_component_": "torchtune.datasets.chat_dataset",
    "conversation_column": "messages",
    "conversation_style": "openai",
    "train_on_input": False,
}
SHAREGPT = {**CHAT, "conversation_style": "sharegpt"}
PAIRS = {"_component_": "torchtune.datasets.preference_dataset"}
TEXT = {"_component_": "torchtune.datasets.text_completion_dataset", "column": "answer"}
ALPACA = {"_component_": "torchtune.datasets.alpaca_dataset"}
QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "w"}
# A right row of each kind, which comes twice before the wrong one
RIGHT = {
    "instruct": {"question": "q", "answer": "a"},
    "chat": {"messages": [QUESTION, ANSWER]},
    "sharegpt": {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "pairs": {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WORSE]},
    "text": {"question": "q", "answer": "a"},
    "alpaca": {"instruction": "i", "input": "", "output": "o"},
}
SECTIONS = {"instruct": INSTRUCT, "chat": CHAT, "sharegpt": SHAREGPT, "pairs": PAIRS, "text": TEXT, "alpaca": ALPACA}

WRONG = [
    ("instruct", {"question": "q", "answer": None}, "answer is null"),
    ("instruct", {"q": "a", "a": "b"}, r"question is missing \(the row has q, a\)"),
    ("instruct", {"question": "q", "answer": 5}, r"answer is 5, not text \(write it in quotes"),
    ("text", {"question": "q", "answer": None}, "answer is null"),
    ("alpaca", {"instruction": None, "input": "", "output": "o"}, "instruction is null"),
    ("chat", {"messages": []}, "messages is an empty list"),
    ("chat", {"messages": None}, "messages is null"),
    ("chat", {"messages": [QUESTION, None]}, "message 1 of messages is None, not an object with role and content"),
    ("chat", {"messages": [QUESTION]}, "messages has no assistant message"),
    ("chat", {"messages": [{"role": "system", "content": "s"}, QUESTION]}, "messages has no assistant message"),
    # of which torchtune makes a copy of the question
    ("chat", {"messages": [QUESTION, {"role": "assistant", "content": None}]}, "content of message 1 of messages is n"),
    ("chat", {"messages": [QUESTION, {"role": "assistant", "content": 5}]}, "content of message 1 of messages is 5"),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, ANSWER]},
        "a text part of message 0 of messages is null",
    ),
    ("chat", {"messages": [{"content": "q"}, ANSWER]}, r"role of message 0 of messages is missing \(it has content\)"),
    ("chat", {"messages": [QUESTION, QUESTION, ANSWER]}, "Two consecutive user messages at index 1"),
    ("chat", {"messages": [QUESTION, ANSWER, {"role": "tool", "content": "t"}, ANSWER]}, "Assistant message before ex"),
    (
        "sharegpt",
        {"messages": [{"from": "human", "value": "q"}, {"from": "tool", "value": "a"}]},
        "from of .* 'tool'",
    ),
    ("chat", {"messages": [{"role": "human", "content": "q"}, ANSWER]}, "role of .* is 'human', .*: write user"),
    ("chat", {"messages": [QUESTION, {"role": "asistant", "content": "a"}]}, "role of .*'asistant'.*: write assistant"),
    (
        "chat",
        {"messages": [{"from": "human", "value": "q"}]},
        r"message 0 .* has from and value, .* conversation_style: s",
    ),
    ("sharegpt", {"messages": [QUESTION, ANSWER]}, r"message 0 .* has role and content, .* conversation_style: openai"),
    ("chat", {"messages": "[{}]"}, "messages is .*: write the list itself"),
    ("chat", {"messages": [QUESTION, {**ANSWER, "content": None, "tool_calls": [{}]}]}, "content .* null .tool_calls"),
    ("pairs", {"chosen": [QUESTION, ANSWER]}, "rejected is missing"),
    ("pairs", {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, "chosen and rejected are the same"),
    ("pairs", {"chosen": [QUESTION, ANSWER], "rejected": []}, "rejected is an empty list"),
    ("pairs", {"chosen": [QUESTION], "rejected": [QUESTION, ANSWER]}, "chosen has no assistant message"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny_tokenizer().save(str(path))
    return ChatMLTokenizer(str(path), max_seq_len=64)


@pytest.fixture
def build(tokenizer, tmp_path, monkeypatch):
    """Function that writes files and builds a data set of one of them, as the recipes do."""
    monkeypatch.chdir(tmp_path)

    def build(section: dict, content: str | bytes, file: str = "rows.jsonl", **keys):
        Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
        source = "csv" if file.endswith(".csv") else "json"
        section = {"source": source, "split": "train", "data_files": file, **section, **keys}
        return build_dataset(OmegaConf.create(section), tokenizer)[0]

    return build


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


PACKED_OR_NOT = [(*case, False) for case in WRONG] + [(*case, True) for case in WRONG if case[0] != "pairs"]


@pytest.mark.parametrize(("kind", "wrong", "fault", "packed"), PACKED_OR_NOT)
def test_a_wrong_row_is_named_before_training(kind, wrong, fault, packed, build):
    content = lines(RIGHT[kind], RIGHT[kind], wrong)
    with pytest.raises(
        UserError, match=rf"^row 2 of dataset \(rows\.jsonl, line 3\): {fault}.*counted from 0"
    ) as error:
        build(SECTIONS[kind], content, **({"packed": True} if packed else {}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", SECTIONS)
def test_right_rows_are_as_torchtune_gives_them(kind, build, tokenizer):
    from torchtune.config import instantiate

    dataset = build(SECTIONS[kind], lines(*[RIGHT[kind]] * 3))
    section = {"source": "json", "split": "train", "data_files": "rows.jsonl", **SECTIONS[kind]}
    wanted = list(instantiate(OmegaConf.create(section), tokenizer))
    assert len(wanted) == len(dataset) == 3 and [dataset[i] for i in range(3)] == wanted


def test_a_number_as_alpacas_instruction_is_text(build):
    numbers, texts = (
        build(ALPACA, lines(*[{"instruction": kind(i), "input": "", "output": "o"} for i in range(3)]))
        for kind in (int, str)
    )
    assert list(numbers) == list(texts)


@pytest.mark.parametrize("kind", ["chat", "sharegpt", "pairs"])
def test_a_system_message_that_new_system_prompt_replaces_may_be_null(kind, build):
    role, content = ("from", "value") if kind == "sharegpt" else ("role", "content")
    with_null = {name: [{role: "system", content: None}, *messages] for name, messages in RIGHT[kind].items()}
    dataset = build(SECTIONS[kind], lines(RIGHT[kind], with_null), new_system_prompt="Be brief.")
    assert dataset[0] == dataset[1]
    with pytest.raises(UserError, match=f"row 1 .*{content} of message 0 of .* is null"):
        build(SECTIONS[kind], lines(RIGHT[kind], with_null))


def test_a_row_beyond_those_that_are_checked_ahead_is_named_in_the_same_way_when_its_turn_comes(build):
    inner = build(INSTRUCT, lines(*[RIGHT["instruct"]] * 3))._dataset
    inner._data = inner._data.map(lambda row, i: {"answer": None if i == 2 else "a"}, with_indices=True)
    dataset = CheckedRows(inner, "dataset (rows.jsonl)")
    dataset.check(2)
    with pytest.raises(UserError) as ahead:
        dataset.check()
    assert dataset[1] == dataset[0]
    with pytest.raises(UserErrorOfOneRank) as at_its_turn:  # which other ranks do not meet
        dataset[2]
    assert str(ahead.value) == str(at_its_turn.value) and "row 2 of dataset (rows.jsonl)" in str(ahead.value)


def test_a_row_that_a_data_set_of_ones_own_fails_at_is_named():
    class Own(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"tokens": [1]} if index == 0 else {}["no such column"]

    dataset = CheckedRows(Own(), "dataset")
    assert dataset[0] == {"tokens": [1]}
    with pytest.raises(UserError, match="row 1 of dataset: KeyError: 'no such column': the data set's own") as error:
        dataset[1]
    assert isinstance(error.value.__cause__, KeyError)  # with its traceback
    with pytest.raises(IndexError):  # where iteration ends
        dataset[2]


def test_an_error_in_a_transform_of_ones_own_keeps_its_traceback(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines(RIGHT["instruct"], RIGHT["instruct"]))
    inner = SFTDataset(
        source="json", split="train", data_files=str(tmp_path / "rows.jsonl"), model_transform=tokenizer,
        message_transform=lambda row: row["answer"].stripp(),
    )  # fmt: skip
    with pytest.raises(UserErrorOfOneRank, match="row 1 .*'stripp': the data set's own code failed on it") as error:
        CheckedRows(inner, "dataset")[1]
    frames = traceback.extract_tb(error.value.__cause__.__traceback__)
    assert frames[-1].filename == __file__


def test_of_several_data_sets_the_one_with_the_wrong_row_is_named(tokenizer, tmp_path):
    for name, rows in (("a", [RIGHT["instruct"]] * 2), ("b", [RIGHT["instruct"], {"question": "q", "answer": None}])):
        (tmp_path / f"{name}.jsonl").write_text(lines(*rows))
    sections = [{**INSTRUCT, "source": "json", "data_files": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    with pytest.raises(UserError, match=r"row 1 of dataset_val\[1\] \(.*b\.jsonl, line 2\): answer is null"):
        build_dataset(OmegaConf.create(sections), tokenizer, "dataset_val")
    dataset, packed = build_dataset(OmegaConf.create([sections[0], sections[0]]), tokenizer)
    assert isinstance(dataset, ConcatDataset) and len(dataset) == 4 and not packed


RIGHT_LINE = '{"question": "q", "answer": "a"}\n'
FILES = [
    ("rows.jsonl", RIGHT_LINE * 3 + '{"question": "q', r"line 4 of rows\.jsonl is no valid JSON .*: the file is cut"),
    ("rows.jsonl", '{"question": "q"\n' + RIGHT_LINE * 3, r"line 1 of rows\.jsonl is no valid JSON .*: correct it"),
    ("rows.jsonl", RIGHT_LINE * 3 + "5\n", r"line 4 of rows\.jsonl is 5, not an object with the row's columns"),
    ("rows.jsonl", "", r"rows\.jsonl is empty"),
    ("rows.jsonl", "\n \n", r"rows\.jsonl is empty"),
    ("rows.csv", "question,answer\nq,a\né,a\n".encode("latin-1"), r"line 3 of rows\.csv is not UTF-8: convert"),
    ("rows.json", '[\n{"question": "q", "answer": "a"},\n{"question"', r"rows\.json is no valid JSON \(.* in line 3\)"),
    ("rows.csv", "", r"rows\.csv is empty"),
    ("rows.csv", "question,answer\n", r"rows\.csv has a header and no rows"),
    ("rows.csv", "question,answer\nq,a\nq,a, b\n", r"line 3 of rows\.csv has 3 cells, but the header has 2"),
    ("rows.csv", "question,answer\nq,a\nq,\n", r"row 1 of dataset \(rows\.csv, line 3\): answer is null"),
    ("rows.csv", "question,answer\nq,1\nq,2\n", r"row 0 of dataset \(rows\.csv, line 2\): answer is 1, not text"),
]


@pytest.mark.parametrize(
    ("content", "keys", "fault"),
    [
        ("question;answer\nq, r;a\nq;\n", {"sep": ";"}, r"row 1 of dataset \(rows\.csv, line 3\): answer is null"),
        ("question|answer\nq, r|a\nq|\n", {"delimiter": "|"}, r"row 1 of dataset \(rows\.csv, line 3\)"),
        ("question\tanswer\nq, r\ta\nq\t\n", {"sep": r"\t"}, r"row 1 of dataset \(rows\.csv, line 3\)"),
        ("question,answer\n'q\nr',a\nq,\n", {"quotechar": "'"}, r"row 1 of dataset \(rows\.csv, line 4\)"),
        ("q,a\nq,\n", {"column_names": ["question", "answer"]}, r"row 1 of dataset \(rows\.csv\)"),
        ("question  answer\nq  a\nq  \n", {"sep": r"\s\s"}, r"row 1 of dataset \(rows\.csv\)"),
        ("question;answer\nq;a\nq;a;b\n", {"sep": ";"}, "line 3 of rows.csv has 3 cells, .* that holds ';' in quotes"),
        (RIGHT_LINE * 2, {}, "no column 'question': this file is JSON, not CSV: set dataset.source=json"),
        ("question, answer\nq,a\n", {}, r"no column 'answer': set column_map to what there is \(question, ' answer'\)"),
    ],
)
def test_a_wrong_line_of_csv_is_found_with_the_sections_delimiter_and_quotes(content, keys, fault, build):
    with pytest.raises(UserError, match=fault):
        build(INSTRUCT, content, "rows.csv", **keys)


@pytest.mark.parametrize(("file", "content", "fault"), FILES, ids=[f"{f}: {fault[-40:]}" for f, _, fault in FILES])
def test_a_file_that_cannot_be_read_is_named_with_its_line(file, content, fault, build):
    with pytest.raises(UserError, match=fault) as error:
        build(INSTRUCT, content, file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_datasets_loads_although_it_is_not_utf_8_is_named(packed, build):
    with pytest.raises(UserError, match=r"^dataset: line 4 of rows\.jsonl is not UTF-8: convert the file$"):
        build(INSTRUCT, (RIGHT_LINE * 3 + RIGHT_LINE.replace('"a"', '"é"')).encode("latin-1"), packed=packed)


TWO_FILES = ["ok.jsonl", "rows.jsonl"]


@pytest.mark.parametrize("data_files", [TWO_FILES, {"train": "rows.jsonl"}, {"test": "ok.jsonl", "train": TWO_FILES}])
def test_of_several_files_the_one_that_is_cut_off_is_named(data_files, build):
    build(INSTRUCT, RIGHT_LINE * 3, "ok.jsonl")
    with pytest.raises(UserError, match=r"dataset: line 4 of rows\.jsonl is no valid JSON .*: the file is cut off"):
        build(INSTRUCT, RIGHT_LINE * 3 + '{"question": "q', data_files=data_files)


def test_files_in_any_form_that_datasets_reads_are_taken(build):
    assert len(build(INSTRUCT, "\ufeff" + RIGHT_LINE * 3)) == 3
    assert len(build(INSTRUCT, json.dumps([RIGHT["instruct"]] * 3, indent=1), "rows.json")) == 3
    with pytest.raises(UserError, match=r"no file matches no\*\.jsonl"):
        build(INSTRUCT, RIGHT_LINE, data_files="no*.jsonl")


def test_a_column_that_is_not_there_is_named_with_those_that_are(build):
    with pytest.raises(UserError, match="its rows have no column 'prompt': set column_map .* \\(answer, question\\)"):
        build(INSTRUCT, RIGHT_LINE, column_map={"input": "prompt", "output": "answer"})


@pytest.mark.parametrize(("content", "fault"), [(lines({"chosen": None, "rejected": None}), "row 0"), ("{", "line 1")])
def test_the_pairs_of_an_evaluation_are_checked_too(content, fault, tokenizer, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(UserError, match=fault if fault == "row 0" else "is no valid JSON"):
        PreferenceAccuracy(tokenizer, data_files=str(tmp_path / "pairs.jsonl"))


@pytest.mark.parametrize("split_across_pack", [False, True])
def test_the_rows_of_a_pack_are_those_whose_tokens_it_holds(split_across_pack):
    lengths = [3, 4, 1, 8, 2, 2, 5, 7, 1]
    rows = [{"tokens": [i + 1] * n, "labels": [i + 1] * n} for i, n in enumerate(lengths)]
    packed = PackedDataset(rows, max_seq_len=8, split_across_pack=split_across_pack)
    assert len(packed) > 3
    for pack in range(len(packed)):
        wanted = sorted({token - 1 for token in packed[pack]["tokens"].tolist() if token})
        assert list(rows_of_pack(packed, pack)) == wanted
