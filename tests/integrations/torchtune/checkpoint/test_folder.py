"""Checkpoint folders that are damaged in odd ways, and what stands where a checkpoint should: named, never lost."""

import json
import os
import stat

import pytest

from gmt_tune.integrations.torchtune.checkpoint import folder as folders
from gmt_tune.integrations.torchtune.checkpoint import manifest
from gmt_tune.integrations.torchtune.checkpoint.manifest import MANIFEST, Progress

PROGRESS = {
    "global_step": 0, "epoch": 0, "samples": 0, "steps_in_epoch": 0, "rows_of_a_step": 4, "dataset_rows": 8,
    "steps_per_epoch": 2,
    "total_epochs": 1, "skipped_steps": 0, "world_size": 1, "seed": 5, "is_final": False, "config": {},
    "model_files": ["weights"],
}  # fmt: skip


def save(output_dir, step: int, **progress) -> folders.Path:
    name = f"step_{step}"
    folder = folders.incomplete_path(output_dir, name)
    folders.make_incomplete(folder)
    (folder / "weights").write_bytes(bytes(100) + bytes([step]))
    return folders.complete(folder, name, Progress(**{**PROGRESS, "global_step": step, **progress}))[0]


def names(output_dir) -> set[str]:
    return {path.name for path in output_dir.iterdir()}


def write_manifest(folder, progress: dict, files: object = None) -> None:
    """With the right checksum: as another program, or another version, could have written it."""
    files = {"weights": [101, 0]} if files is None else files
    content = {"format": manifest.FORMAT, "progress": progress, "files": files}
    (folder / MANIFEST).write_text(json.dumps({**content, "checksum": manifest._checksum(content)}))


MANIFESTS = {
    "a list": lambda folder: (folder / MANIFEST).write_text("[1, 2]"),
    "nested without end": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
    "nested objects": lambda folder: (folder / MANIFEST).write_text('{"a":' * 100_000),
    "nested as deep as can be read": lambda folder: (folder / MANIFEST).write_text(
        '{"checksum": 0, "progress": ' + "[" * 900 + "]" * 900 + "}"
    ),
    "not text": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "a pipe": lambda folder: ((folder / MANIFEST).unlink(), os.mkfifo(folder / MANIFEST)),
    "a folder": lambda folder: ((folder / MANIFEST).unlink(), (folder / MANIFEST).mkdir()),
    "a loop of links": lambda folder: (
        (folder / MANIFEST).unlink(),
        (folder / MANIFEST).symlink_to(MANIFEST),
    ),
    "no progress": lambda folder: write_manifest(folder, None),
    "files is a list": lambda folder: write_manifest(folder, {**PROGRESS, "global_step": 2}, files=["weights"]),
    "a file without its size": lambda folder: write_manifest(folder, PROGRESS, files={"weights": [1]}),
    "a file of the model without checksum": lambda folder: write_manifest(folder, PROGRESS, files={"other": [1, 1]}),
    "the step is text": lambda folder: write_manifest(folder, {**PROGRESS, "global_step": "2"}),
    **{
        f"{key} is {value}": lambda folder, key=key, value=value: write_manifest(folder, {**PROGRESS, key: value})
        for key, value in (("global_step", True), ("global_step", -1), ("world_size", 0), ("steps_per_epoch", None))
    },
    "model files are lists": lambda folder: write_manifest(folder, {**PROGRESS, "model_files": [["weights"]]}),
    **{
        f"without {key}": lambda folder, key=key: write_manifest(
            folder, {k: value for k, value in PROGRESS.items() if k != key}
        )
        for key in PROGRESS
    },
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_is_not_as_it_was_written_is_damage(kind, tmp_path):
    save(tmp_path, 1)
    MANIFESTS[kind](save(tmp_path, 2))
    said = []
    found = folders.newest_whole(tmp_path, said.append)
    assert found is not None and found.path.name == "step_1"
    assert len(said) == 1 and f"{tmp_path / 'step_2'} is passed over" in said[0]


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    """As a failing disk does: EIO after the first bytes."""
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    read = manifest._size_and_crc32

    def failing(file):
        if broken in file.parents:
            raise OSError(5, "Input/output error", str(file))
        return read(file)

    monkeypatch.setattr(manifest, "_size_and_crc32", failing)
    said = []
    assert folders.newest_whole(tmp_path, said.append).path.name == "step_1"
    assert "weights cannot be read: Input/output error" in said[0]


def test_damaged_checkpoints_take_free_names(tmp_path):
    for _ in range(3):
        damaged = save(tmp_path, 3)
        (damaged / "weights").write_bytes(b"")
        assert folders.newest_whole(tmp_path, print) is None
        folders.set_damaged_aside(tmp_path, newer_than=None)
    assert names(tmp_path) == {"damaged_step_3", "damaged_step_3_2", "damaged_step_3_3"}


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_what_has_a_checkpoints_final_name_is_renamed_when_a_run_reaches_it(kind, tmp_path):
    elsewhere, there = tmp_path / "elsewhere", tmp_path / "out" / "step_2"
    elsewhere.mkdir()
    there.parent.mkdir()
    (elsewhere / "precious").write_text("mine")
    if kind == "folder":
        there.mkdir()
        (there / "precious").write_text("mine")
    elif kind == "file":
        there.write_text("mine")
    else:
        there.symlink_to(elsewhere if kind == "link" else tmp_path / "nowhere")
    save(tmp_path / "out", 2)
    assert folders.newest_whole(tmp_path / "out", pytest.fail).path == there
    aside = tmp_path / "out" / "earlier_step_2"
    if kind == "file":
        assert aside.read_text() == "mine"
    elif kind == "dangling link":
        assert aside.is_symlink()
    else:
        assert (aside / "precious").read_text() == "mine"
    assert (elsewhere / "precious").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_stands_where_a_checkpoint_is_to_be_written_is_no_full_disk(kind, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in (".incomplete-step_1", ".incomplete-discarded-step_1", ".incomplete-step_9"):
        (out / name).write_text("") if kind == "file" else (out / name).symlink_to(elsewhere)
    save(out, 1)
    save(out, 2)
    folders.keep_newest(out, 1)
    folders.remove_incomplete(out)
    assert names(out) == {"step_2"} and (elsewhere / "precious").exists()


def test_a_new_run_moves_all_that_has_a_checkpoints_name(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "epoch_0").mkdir()
    (tmp_path / "epoch_0" / "precious.safetensors").write_text("of torchtune's own recipe")
    (tmp_path / "step_7").write_text("")
    (tmp_path / "epoch_best").mkdir()
    aside = folders.move_aside(tmp_path)
    assert aside == tmp_path / "previous_1" and names(aside) == {"step_1", "epoch_0", "step_7"}
    assert (aside / "epoch_0" / "precious.safetensors").exists() and names(tmp_path) == {"previous_1", "epoch_best"}


def test_the_best_checkpoint_is_found_without_its_mark(tmp_path):
    """A kill between the rename and the mark."""
    for step, loss in ((1, 3.0), (2, 1.0), (3, 1.0), (4, float("nan")), (5, None)):
        save(tmp_path, step, val_loss=loss)
    assert folders.best(tmp_path).step == 2
    folders.mark_best(tmp_path)
    assert json.loads((tmp_path / folders.MARK_OF_BEST).read_text()) == {"folder": "step_2", "val_loss": 1.0}


@pytest.mark.parametrize("umask, wanted", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_of_all_files_follow_umask(umask, wanted, tmp_path):
    before = os.umask(umask)
    try:
        folder = folders.incomplete_path(tmp_path, "step_1")
        folders.make_incomplete(folder)
        (folder / "sub").mkdir()
        for name, mode in (("model.safetensors", 0o600), ("config.json", 0o444), ("sub/tokenizer.json", 0o640)):
            (folder / name).write_text("x")
            (folder / name).chmod(mode)
        final, _ = folders.complete(folder, "step_1", Progress(**PROGRESS))
    finally:
        os.umask(before)
    files = [path for path in final.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {wanted}
