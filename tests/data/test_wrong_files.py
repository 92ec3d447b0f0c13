"""Wrong data files end a run in one sentence, before the model is loaded; right ones are as they were."""

import gzip
import json
import os
import re
import runpy
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.training import FullModelHFCheckpointer

from gmt_tune.data import files, scan
from gmt_tune.data.files import fault_of_files, rows_of
from gmt_tune.data.loading import load_dataset
from gmt_tune.data.scan import files_of_section, scan_section
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.plugin.assets import register_resolver
from gmt_tune.integrations.torchtune.plugin.registry import config_paths, recipe_path

ROOT = Path(__file__).parents[2]
CHAT = ["dataset._component_=torchtune.datasets.chat_dataset", "dataset.conversation_style=openai"]
CHAT += ["dataset.conversation_column=messages"]
SECTION = {"_component_": "torchtune.datasets.instruct_dataset", "source": "json", "data_files": "rows.jsonl"}

# What the files are said to hold, by the first word of their names
KINDS = {
    "chat": {"_component_": "chat_dataset", "conversation_column": "messages", "conversation_style": "openai"},
    "sharegpt": {
        "_component_": "chat_dataset", "conversation_column": "conversations", "conversation_style": "sharegpt",
    },
    "answers": {"_component_": "instruct_dataset", "column_map": {"input": "question", "output": "answer"}},
    "texts": {"_component_": "text_completion_dataset", "column": "text"},
    "pairs": {"_component_": "preference_dataset"},
}  # fmt: skip
# Each file of the folder wrong_files: where its fault is (a row in its line, a line, or the whole file), and what it is
WRONG = {
    "chat_answer_behind_tool.jsonl": ("row 1, line 2", "Assistant message before expected user message"),
    "chat_empty.jsonl": ("row 1, line 2", "messages is an empty list"),
    "chat_half_character.jsonl": ("file", "cannot be loaded: .*The surrogate pair in string is invalid. in row 1"),
    "chat_human.jsonl": ("row 1, line 2", "role of message 0 of messages is 'human', none of .*: write user"),
    "chat_in_quotes.jsonl": ("row 1, line 2", "messages is .*: write the list itself"),
    "chat_is_sharegpt.jsonl": ("row 0, line 1", "message 0 of messages has from .*: set conversation_style: sharegpt"),
    "chat_late_system.jsonl": ("row 1, line 2", "System message at index 2 .*, but system messages must come first"),
    "chat_message_is_text.jsonl": ("row 1, line 2", "message 0 of messages is 'What is .*', not an object"),
    "chat_misspelt_role.jsonl": ("row 1, line 2", "role of message 1 of messages is 'asistant', .*: write assistant"),
    "chat_no_answer.jsonl": ("row 1, line 2", "messages has no assistant message"),
    "chat_no_role.jsonl": ("row 1, line 2", r"role of message 0 of messages is missing \(it has content\)"),
    "chat_null.jsonl": ("row 1, line 2", "messages is null"),
    "chat_null_content.jsonl": ("row 1, line 2", "content of message 1 of messages is null"),
    "chat_number_as_content.jsonl": ("row 1, line 2", "content of message 1 of messages is 2, not text"),
    "chat_other_column.jsonl": ("file", r"no column 'messages': set conversation_column to .* \(chat\)"),
    "chat_tool_calls.jsonl": ("row 1, line 2", r"content of message 1 of messages is null \(tool_calls are not read"),
    "chat_twice.jsonl": ("file", r"cannot be loaded: .*Column\(/messages\) was specified twice in row 1"),
    "chat_two_questions.jsonl": ("row 1, line 2", "Two consecutive user messages"),
    "sharegpt_bing.jsonl": ("row 1, line 2", "from of message 1 of conversations is 'bing', .*: write gpt"),
    "answers_broken_line.jsonl": ("line 2", "is no valid JSON .*: correct it"),
    "answers_cut_off.jsonl": ("line 2", "is no valid JSON .*: the file is cut off there"),
    "answers_dates.jsonl": ("row 0, line 1", r"answer is a date \(2024-01-01 .*write the column as text into a CSV"),
    "answers_empty.jsonl": ("file", "is empty"),
    "answers_header_alone.csv": ("file", "has a header and no rows"),
    "answers_latin_1.csv": ("line 3", "is not UTF-8: convert the file"),
    "answers_latin_1.jsonl": ("line 2", "is not UTF-8: convert the file"),
    "answers_line_is_list.jsonl": ("line 2", r"is \['What is 1 \+ 1\?', '2'\], not an object"),
    "answers_list.json": ("row 1, line 6", "answer is null"),
    "answers_list_cut_off.json": ("file", r"is no valid JSON \(Unterminated string starting in line 7\)"),
    "answers_missing.jsonl": ("row 1, line 2", r"answer is missing \(the row has question\)"),
    "answers_more_cells.csv": ("line 3", "has 3 cells, but the header has 2"),
    "answers_null.csv": ("row 1, line 3", "answer is null"),
    "answers_null.jsonl": ("row 1, line 2", "answer is null"),
    "answers_number.jsonl": ("row 1, line 2", "answer is 2, not text"),
    "answers_semicolons.csv": ("file", "no column 'question': .*: set dataset.sep=';'"),
    "texts_dates.parquet": ("row 0", r"text is a date \(2024-01-02 .*write the column as text"),
    "texts_no_parquet.parquet": ("file", "is cut off or no Parquet file"),
    "texts_null.parquet": ("row 1", "text is null"),
    "texts_other_column.jsonl": ("file", r"no column 'text': set column to what there is \(story\)"),
    "pairs_equal.jsonl": ("row 1, line 2", "chosen and rejected are the same"),
    "pairs_equal_often.jsonl": (
        "row 1, line 2",
        r"delete such rows, as jq -c 'select\(.chosen != .rejected\)' .*; 2 more of the first 5 rows are wrong: 3, 4 ",
    ),
    "pairs_no_answer.jsonl": ("row 1, line 2", "chosen has no assistant message"),
    "pairs_no_question.jsonl": ("row 1, line 2", "chosen begins with its answer"),
    "pairs_one_is_missing.jsonl": ("row 1, line 2", "rejected is missing"),
    "pairs_other_question.jsonl": ("row 1, line 2", "chosen and rejected begin with different questions"),
    "pairs_rejected_is_text.jsonl": ("row 1, line 2", "rejected is '3', not a list of messages"),
}
FILES = Path(__file__).with_name("wrong_files")


def test_every_wrong_file_is_in_the_list():
    assert {path.name for path in FILES.iterdir()} == WRONG.keys() and len(WRONG) > 20


@pytest.fixture(scope="module")
def recipes():
    """The classes of both recipes, from their files."""
    register_resolver()
    names = {"gmt_full_finetune": "GMTFullFinetuneRecipe", "gmt_full_dpo": "GMTFullDPORecipe"}
    return {name: runpy.run_path(str(recipe_path(name)))[class_name] for name, class_name in names.items()}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_ends_a_run_in_one_sentence_before_the_model_is_loaded(name, recipes, tmp_path, monkeypatch):
    where, fault = WRONG[name]
    kind, is_json = KINDS[name.partition("_")[0]], name.endswith((".json", ".jsonl"))
    is_dpo = kind["_component_"] == "preference_dataset"
    cfg = OmegaConf.load(config_paths()["quickstart_dpo" if is_dpo else "quickstart"])
    cfg.output_dir, cfg.dataset_val, cfg.run_val_every_n_steps = str(tmp_path), None, None
    cfg.dataset = {**kind, "_component_": f"torchtune.datasets.{kind['_component_']}", "data_files": str(FILES / name)}
    cfg.dataset.source = "json" if is_json else name.rpartition(".")[2]
    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", lambda self: pytest.fail("the model is loaded"))
    recipe = recipes["gmt_full_dpo" if is_dpo else "gmt_full_finetune"]
    try:
        with pytest.raises(UserError, match=fault) as error:
            recipe(cfg).setup(cfg)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    sentence = str(error.value)
    assert "\n" not in sentence and name in sentence
    row, line = (re.search(rf"{word} \d+", where) for word in ("row", "line"))
    assert row is None or sentence.startswith(f"{row[0]} of dataset ({FILES / name}")
    assert line is None or line[0] in sentence.partition(": " if row else " is no ")[0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [{"role": "human", "content": "a"}]}', r"row 2 of dataset \(.*, line 3\): role of message 0"),
        pytest.param('{"messages": [{"role"', r"dataset: line 3 of .* is no valid JSON", marks=pytest.mark.slow),
    ],
)
def test_tune_run_ends_before_the_model_is_loaded(line, said, run_tune, tmp_path):
    right = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    (tmp_path / "rows.jsonl").write_text(f"{right}\n{right}\n{line}\n")
    process = run_tune(
        *("run", "gmt_full_finetune", "--config", "quickstart", "~dataset.size", *CHAT, "dataset.source=json"),
        *(f"dataset.data_files={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'out'}"),
        cwd=tmp_path,
        check=False,
    )
    assert process.returncode == 1 and "Traceback" not in process.stderr
    (error,) = re.findall("^Error: (.*)$", process.stderr, re.MULTILINE)
    assert re.match(said, error) and "Model is initialized" not in process.stderr


def write(rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_outside_of_the_split_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write([{"input": "q", "output": "a"}] * 9 + [{"input": "q", "output": None}])
    assert scan_section({**SECTION, "split": "train[:90%]"}, "dataset")
    with pytest.raises(UserError, match=r"row 0 of dataset \(rows\.jsonl, line 10\): output is null"):
        scan_section({**SECTION, "split": "train[90%:]"}, "dataset")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "jsonl"}, r"dataset\.source is jsonl, which reads no files: did you mean json\? \(JSON Lines"),
        ({"size": 3}, r"dataset\.size is no key of torchtune\.datasets\.chat_dataset: it takes .*\(~dataset\.size"),
        ({"conversation_colum": "x"}, r"did you mean conversation_column\? \(~dataset\.conversation_colum takes it"),
    ],
)
def test_keys_of_another_component_and_sources_that_are_none_are_named(change, said, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    section = {**KINDS["chat"], "_component_": "torchtune.datasets.chat_dataset", "data_files": "rows.jsonl"}
    with pytest.raises(UserError, match=said):
        load_dataset(OmegaConf.create({"source": "json", "split": "train", **section, **change}), None, "dataset")
    assert "Retry" not in caplog.text


def test_what_is_not_known_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write([{"x": None}])
    for change in (
        {"_component_": "mine.instruct_dataset"},
        {"field": "data"},
        {"data_files": "https://x.org/a.jsonl"},
    ):
        assert not scan_section({**SECTION, **change}, "dataset")
    assert files_of_section({**SECTION, "source": "openai/gsm8k"}) is None


@pytest.mark.parametrize("brackets", ["[" * 5000, "[" * 5000 + "\n" + "["])
def test_json_that_is_nested_without_end_is_named(brackets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(brackets)
    section = {"source": "json", "data_files": "rows.jsonl"}
    assert fault_of_files(section).startswith("rows.jsonl is no valid JSON (")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"column_map": "answer"}, "column_map"),
        ({"column_map": {"input": ["question"]}}, "column_map"),
        ({"_component_": "torchtune.datasets.text_completion_dataset", "column": ["text"]}, "column"),
    ],
)
def test_a_column_whose_name_is_no_text_is_refused_by_key(change, key):
    with pytest.raises(UserError, match=rf"^dataset\.{key} must .*, got "):
        scan_section({**SECTION, **change}, "dataset")


def test_a_sample_is_looked_at_where_there_are_very_many_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scan, "ROWS_SCANNED", 2)
    write([{"input": "q", "output": "a"}] * 2 + [{"input": "q", "output": None}])
    said = []
    monkeypatch.setattr(scan.utils, "log_rank_zero", lambda log, message: said.append(message))
    assert scan_section(SECTION, "dataset")
    assert said == ["Checked the first 2 rows of dataset; the others are checked as they are read."]


@pytest.mark.parametrize("source", ["json", "csv"])
def test_wrong_rows_after_the_first_are_counted_up_to_a_thousand(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right, wrong = {"input": "q", "output": "a"}, {"input": "q", "output": None}
    rows = [right, wrong, right, wrong]
    for often, said in ((1, "1 more of the first 4 rows is wrong: 3 "), (600, "1,000 more of the first 2,002 rows ")):
        if source == "json":
            write(rows * often)
        else:
            lines = [f"{row['input']},{row['output'] or ''}\n" for row in rows * often]
            Path("rows.jsonl").write_text("input,output\n" + "".join(lines))
        with pytest.raises(UserError, match=rf"^row 1 of .*output is null.*; {said}"):
            load_dataset(OmegaConf.create({**SECTION, "source": source}), None, "dataset")


def test_rows_behind_a_line_that_cannot_be_read_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = json.dumps({"input": "q", "output": None})
    Path("rows.jsonl").write_text(f"{wrong}\n{wrong}\n{{broken\n{wrong}\n")
    with pytest.raises(UserError, match=r"^row 0 .*; 1 more of the first 2 rows is wrong: 1 \("):
        scan_section(SECTION, "dataset")


LIST = """ [
  {"input": "a \\" ]}, b", "output": "\\u00e9 é"}, {"input": {"x": [1, 2]},
   "output": 12}, {}
  ,{"output": "[{"}
]

"""


@pytest.mark.parametrize("size", [*range(1, 40), 1000])
def test_a_list_is_read_in_blocks_of_any_size(size, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHARACTERS_AT_ONCE", size)
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + LIST, encoding="utf-8")
    lines, rows = zip(*rows_of(path, "json"), strict=True)
    assert list(rows) == json.loads(LIST) and lines == (2, 2, 3, 4)
    for end in range(1, len(LIST.rstrip())):
        path.write_text(LIST[:end], encoding="utf-8")
        with pytest.raises(UserError, match="is no valid JSON|is empty"):
            list(rows_of(path, "json"))


@pytest.mark.parametrize("text", ['[{"a": 1},]', '[{"a": 1} {"a": 1}]', '[{"a": 1}] x', "[{}, {'a': 1}]", "[,{}]"])
def test_a_list_that_is_no_json_is_refused(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=r"rows\.json is no valid JSON \(.* in line 1\): correct it"):
        list(rows_of(tmp_path / "rows.json", "json"))


def test_a_list_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"input": "question " * 20, "output": "answer " * 100})
    Path("rows.jsonl").write_text(f"[{', '.join([row] * 20_000)}]")
    tracemalloc.start()
    try:
        assert scan_section(SECTION, "dataset")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert Path("rows.jsonl").stat().st_size > 16 * 2**20 > 2 * peak


@pytest.mark.parametrize(
    ("content", "size", "said"),
    [
        (b'{"input": "q", "output": null}\n', None, r"row 2 of dataset \(rows\.jsonl\.gz, line 3\): output is null"),
        (b'{"input', None, r"dataset: line 3 of rows\.jsonl\.gz is no valid JSON .*: the file is cut off there"),
        (b'{"input": "\xe9"}\n', None, r"dataset: line 3 of rows\.jsonl\.gz is not UTF-8"),
        (b"", -10, r"dataset: rows\.jsonl\.gz is cut off or no gzip file \(.*\): copy it again"),
    ],
)
def test_compressed_files_are_checked_too(content, size, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = b'{"input": "q", "output": "a"}\n' * 2 + content
    Path("rows.jsonl.gz").write_bytes(gzip.compress(lines)[:size])
    with pytest.raises(UserError, match=said):
        load_dataset(OmegaConf.create({**SECTION, "data_files": "rows.jsonl.gz"}), None, "dataset")


def test_a_file_that_the_system_does_not_let_us_read_is_named():
    with pytest.raises(UserError, match=r"^dataset: /proc/self/mem cannot be read: Input/output error$"):
        load_dataset(OmegaConf.create({**SECTION, "data_files": "/proc/self/mem"}), None, "dataset")


def test_a_source_of_files_without_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no rows")
    with pytest.raises(UserError, match="^dataset: data_files is missing: name the json files$"):
        load_dataset(OmegaConf.create({**SECTION, "data_files": None}), None, "dataset")


def test_files_in_data_dir_and_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts" / "old").mkdir(parents=True)
    Path("parts/rows.jsonl").write_text('{"input": "q", "output": "a"}\n{"input')
    for change, said in (
        ({"data_dir": 5}, "dataset cannot be loaded: "),
        ({"data_dir": "parts"}, r"dataset: line 2 of parts/rows\.jsonl is no valid JSON"),
        ({"data_files": "parts/*"}, r"dataset: line 2 of parts/rows\.jsonl is no valid JSON"),
        ({"data_files": "parts"}, r"dataset: parts is a folder: name the files in it, such as parts/\*\.jsonl"),
    ):
        with pytest.raises(UserError, match=said):
            load_dataset(OmegaConf.create({**SECTION, **change}), None, "dataset")


def test_a_column_that_becomes_text_after_many_dates_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write([{"input": "q", "output": "2024-01-02"}] * 3 + [{"input": "q", "output": "soon"}] * 3)
    with pytest.raises(UserError, match=r"'soon' as a scalar of type timestamp.*: give all rows one type"):
        load_dataset(OmegaConf.create({**SECTION, "chunksize": 60}), None, "dataset")


def test_chats_hear_of_conversation_column_and_a_style_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write([{"chats": []}])
    section = {**SECTION, "_component_": "torchtune.datasets.chat_dataset", "conversation_column": "messages"}
    with pytest.raises(UserError, match=r"no column 'messages': set conversation_column to what there is \(chats\)"):
        scan_section({**section, "conversation_style": "openai"}, "dataset")
    with pytest.raises(UserError, match="dataset.conversation_style must be openai or sharegpt, got 'chatml'"):
        scan_section({**section, "conversation_style": "chatml"}, "dataset")


@pytest.mark.slow
def test_own_chats_become_a_model_that_answers_in_transformers(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        ["bash", ROOT / "examples" / "own_chats.sh", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Where does Ada live? -> In the red house.\nWhere does Bob live? -> In the old mill.\n" in process.stdout
