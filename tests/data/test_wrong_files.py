"""Wrong data files end a run in one sentence, before the model is loaded; right ones are as they were."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune.training import FullModelHFCheckpointer

from gmt_tune.data import scan
from gmt_tune.data.files import fault_of_files
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
    "chat_human.jsonl": ("row 1, line 2", "role of message 0 of messages is 'human', none of .*: write user"),
    "chat_in_quotes.jsonl": ("row 1, line 2", "messages is .*: write the list itself"),
    "chat_is_sharegpt.jsonl": ("row 0, line 1", "message 0 of messages has from .*: set conversation_style: sharegpt"),
    "chat_late_system.jsonl": ("row 1, line 2", "System message at index 2 .*, but system messages must come first"),
    "chat_message_is_text.jsonl": ("row 1, line 2", "message 0 of messages is 'What is .*', not an object"),
    "chat_misspelt_role.jsonl": ("row 1, line 2", "role of message 1 of messages is 'asistant', .*: write assistant"),
    "chat_no_answer.jsonl": ("row 1, line 2", "messages has no message of the assistant"),
    "chat_no_role.jsonl": ("row 1, line 2", r"role of message 0 of messages is missing \(it has content\)"),
    "chat_null.jsonl": ("row 1, line 2", "messages is null"),
    "chat_null_content.jsonl": ("row 1, line 2", "content of message 1 of messages is null"),
    "chat_number_as_content.jsonl": ("row 1, line 2", "content of message 1 of messages is 2, not text"),
    "chat_other_column.jsonl": ("file", r"no column 'messages': set conversation_column to .* \(chat\)"),
    "chat_tool_calls.jsonl": ("row 1, line 2", r"content of message 1 of messages is null \(tool_calls are not read"),
    "chat_two_questions.jsonl": ("row 1, line 2", "Two consecutive user messages"),
    "sharegpt_bing.jsonl": ("row 1, line 2", "from of message 1 of conversations is 'bing', .*: write gpt"),
    "answers_broken_line.jsonl": ("line 2", "is no valid JSON .*: correct it"),
    "answers_cut_off.jsonl": ("line 2", "is no valid JSON .*: the file is cut off there"),
    "answers_empty.jsonl": ("file", "is empty"),
    "answers_header_alone.csv": ("file", "has a header and no rows"),
    "answers_latin_1.csv": ("line 3", "is not UTF-8: convert the file"),
    "answers_line_is_list.jsonl": ("line 2", r"is \['What is 1 \+ 1\?', '2'\], not an object"),
    "answers_missing.jsonl": ("row 1, line 2", r"answer is missing \(the row has question\)"),
    "answers_more_cells.csv": ("line 3", "has 3 cells, but the header has 2"),
    "answers_null.csv": ("row 1, line 3", "answer is null"),
    "answers_null.jsonl": ("row 1, line 2", "answer is null"),
    "answers_number.jsonl": ("row 1, line 2", "answer is 2, not text"),
    "answers_semicolons.csv": ("file", "no column 'question': .*: set dataset.sep=';'"),
    "texts_no_parquet.parquet": ("file", "is cut off or no Parquet file"),
    "texts_null.parquet": ("row 1", "text is null"),
    "texts_other_column.jsonl": ("file", r"no column 'text': set column to what there is \(story\)"),
    "pairs_equal.jsonl": ("row 1, line 2", "chosen and rejected are the same"),
    "pairs_no_answer.jsonl": ("row 1, line 2", "chosen has no message of the assistant"),
    "pairs_one_is_missing.jsonl": ("row 1, line 2", "rejected is missing"),
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
    kind, is_json = KINDS[name.partition("_")[0]], name.endswith(".jsonl")
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
    assert fault_of_files("rows.jsonl", "json").startswith("rows.jsonl is no valid JSON (")


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
