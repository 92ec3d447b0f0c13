"""Paths of a config that lead into its own output_dir are found however they are written."""

import os

import pytest

from gmt_tune.integrations.torchtune.config.inputs import inputs_in

# name: (the key, its section by the folder)
KEYS = {
    "a folder": ("reference.checkpoint_dir", lambda out: {"checkpoint_dir": f"{out}/epoch_0"}),
    "a file in a list": ("dataset.data_files[0]", lambda out: {"data_files": [f"{out}/epoch_0/rows.jsonl"]}),
    "a file of a split": (
        "dataset.data_files.train",
        lambda out: {"data_files": {"train": f"{out}/epoch_0/rows.jsonl"}},
    ),
    "a section of a list": ("dataset[1].data_files", lambda out: [{}, {"data_files": f"{out}/epoch_0/rows.jsonl"}]),
    "a pattern": ("dataset.data_files", lambda out: {"data_files": f"{out}/epoch_0/*.jsonl"}),
    "a pattern of folders": ("dataset.data_files", lambda out: {"data_files": f"{out}/epoch_*/**/*.jsonl"}),
    "a file below another key": (
        "dataset.data_files.train",
        lambda out: {"source": str(out), "data_files": {"train": "epoch_0/rows.jsonl"}},
    ),
    "a file of a folder": (
        "checkpointer.checkpoint_files[0]",
        lambda out: {"checkpoint_dir": str(out), "checkpoint_files": ["epoch_0/rows.jsonl"]},
    ),
    "with dots": ("tokenizer.path", lambda out: {"path": f"{out}/logs/../epoch_0/rows.jsonl"}),
    "as a URL": ("tokenizer.path", lambda out: {"path": f"file://{out}/epoch_0/rows.jsonl"}),
    "relative": ("tokenizer.path", lambda out: {"path": os.path.relpath(out / "epoch_0" / "rows.jsonl")}),
    "through a link to the folder": ("tokenizer.path", lambda out: {"path": f"{out}_link/epoch_0/rows.jsonl"}),
    "through a link to the file": ("tokenizer.path", lambda out: {"path": f"{out}_file"}),
}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    (folder / "epoch_0").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "epoch_0" / "rows.jsonl").write_text("{}\n")
    (tmp_path / "out_link").symlink_to(folder)
    (tmp_path / "out_file").symlink_to(folder / "epoch_0" / "rows.jsonl")
    return folder


@pytest.mark.parametrize("kind", KEYS)
def test_a_path_into_the_folder_is_found_with_its_key(kind, out):
    key, make = KEYS[kind]
    section = key.partition(".")[0].partition("[")[0]
    found = inputs_in({"output_dir": str(out), section: make(out)}, out)
    assert found.keys() - {"logs"} == {"epoch_0"} and found["epoch_0"].startswith(f"{key} (")


def test_names_and_paths_elsewhere_are_not_found(out, tmp_path, monkeypatch):
    monkeypatch.chdir(out / "epoch_0")
    config = {
        "output_dir": str(out),
        "checkpointer": {"checkpoint_dir": str(tmp_path), "model_type": "LLAMA3_2"},
        "dtype": "fp32",
        "name": "epoch_0/none",
        "text": "a\0b",
        "long": "x" * 10_000,
        "dense": ["*norm*"],
        "none": None,
    }
    assert inputs_in(config, out) == {}


@pytest.mark.parametrize("cwd", ["epoch_0", "."])
def test_names_of_parameters_and_files_of_another_folder_are_not_looked_for_here(cwd, out, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "rows.jsonl").touch()
    monkeypatch.chdir(out / cwd)
    config = {
        "gradient_mask": {"frozen": ["*"], "dense": ["**"]},
        "checkpointer": {"checkpoint_dir": str(tmp_path / "model"), "checkpoint_files": ["rows.jsonl", "*.jsonl"]},
    }
    assert inputs_in(config, out) == {}


def test_files_that_cannot_be_in_the_folder_are_not_looked_at_one_by_one(out, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for i in range(100):
        (tmp_path / "data" / f"{i}.json").touch()
    seen = []
    realpath = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: seen.append(path) or realpath(path))
    assert inputs_in({"data_files": f"{tmp_path}/data/*.json"}, out) == {}
    assert len(seen) < 10
