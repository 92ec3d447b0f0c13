"""Base and delta give the tuned folder, tuned folder and delta the base's: every file, byte for byte."""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from model_folders import LAYER, changed, contents, run_command, save_model
from safetensors import safe_open

from gmt_tune.cli.main import main


def run(capsys, *arguments) -> str:
    """What the command printed."""
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def complaint(capsys, *arguments) -> str:
    """What the command printed when it failed: one line, without a traceback; it left nothing behind."""
    here = {path for path in Path(arguments[-1]).parent.iterdir()}
    assert main([*map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("gmt-tune: ") and captured.err.count("\n") == 1
    assert {path for path in Path(arguments[-1]).parent.iterdir()} == here
    return captured.err


def round_trip(capsys, base: Path, tuned: Path, *options: str) -> str:
    """Make a delta, apply it, take it back; returns what `gmt-tune delta` printed."""
    work = base.parent
    printed = run(capsys, "delta", base, tuned, work / "it.safetensors", *options)
    run(capsys, "apply", base, work / "it.safetensors", work / "again")
    assert contents(work / "again") == contents(tuned)
    run(capsys, "apply", "--remove", tuned, work / "it.safetensors", work / "back")
    assert contents(work / "back") == contents(base)
    return printed


@pytest.mark.parametrize("tensors", [torch.float32, torch.bfloat16, torch.float16], indirect=True)
@pytest.mark.parametrize("shards", [(1, 1), (1, 3), (2, 1)])
def test_folders_come_back_byte_for_byte(shards, tensors, tuned, tmp_path, capsys):
    base = save_model(tmp_path / "base", tensors, shards[0], README__md="# Base")
    made = save_model(tmp_path / "tuned", tuned, shards[1], config__json="{}", chat_template__jinja="{{ x }}")
    (made / "additional_chat_templates").mkdir()
    (made / "additional_chat_templates" / "tool_use.jinja").write_text("{{ y }}")
    printed = round_trip(capsys, base, made)
    entries = sum(tensor.numel() for tensor in tensors.values())
    wrong = sum(int((tensors[name] != tuned[name]).sum()) for name in tensors)
    assert f" for {wrong:,} of {entries:,} entries\n" in printed
    size = (tmp_path / "it.safetensors").stat().st_size
    assert f"it.safetensors: {size:,} bytes" in printed
    values = wrong * tensors["model.embed_tokens.weight"].element_size()
    assert size <= 1.3 * (values + min(2 * wrong, entries / 8)) + 8192  # the plan, and the two configs
    assert run(capsys, "diff", base, made).strip() in printed  # the same tables


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_folders_of_two_dtypes(dtypes, tmp_path, capsys):
    before, after = (getattr(torch, dtype) for dtype in dtypes)
    weight = torch.randn(60, 70, generator=torch.Generator().manual_seed(0))
    base = save_model(tmp_path / "base", {"w": weight.to(before)})
    tuned = save_model(tmp_path / "tuned", {"w": changed(weight.to(before).to(after), 0.05)})
    printed = round_trip(capsys, base, tuned, *(() if dtypes[1] == "float32" else ("--force",)))
    if dtypes[1] == "float32":  # which holds the base's values: what did not move takes no room
        assert re.search(r" for 2\d\d of 4,200 entries", printed)


def test_tied_layers_are_stored_once(tmp_path, capsys):
    embedding, after = torch.randn(300, 40), None
    after = changed(embedding, 0.1)
    for i, (here, there) in enumerate([((), ("lm_head",)), (("lm_head",), ()), (("lm_head",), ("lm_head",))]):
        work = tmp_path / str(i)
        folders = []
        for name, value, copies in (("base", embedding, here), ("tuned", after, there)):
            made = {"model.embed_tokens.weight": value} | {f"{copy}.weight": value.clone() for copy in copies}
            folders.append(save_model(work / name, made, config__json='{"tie_word_embeddings": true}'))
        round_trip(capsys, *folders)
        with safe_open(work / "it.safetensors", "pt") as file:
            assert sum(name.endswith(".bits") for name in file.keys()) == 1  # noqa: SIM118  (not a dict)


def test_layers_that_were_equal_in_the_base_need_not_stay_so(tmp_path, capsys):
    ones = {f"model.layers.{i}.input_layernorm.weight": torch.ones(50) for i in range(3)}
    moved = {name: value + 0.5 * (i > 0) * torch.rand(50) for i, (name, value) in enumerate(ones.items())}
    round_trip(capsys, save_model(tmp_path / "base", ones), save_model(tmp_path / "tuned", moved), "--force")


def test_added_tokens_and_layers_are_carried(tensors, tuned, tmp_path, capsys):
    rows = torch.randn(3, 1000).to(tuned["model.embed_tokens.weight"].dtype)
    tuned["model.embed_tokens.weight"] = torch.cat([tuned["model.embed_tokens.weight"], rows])
    tuned["score.weight"] = torch.randn(2, 33)
    del tuned["steps"]
    base = save_model(tmp_path / "base", tensors)
    round_trip(capsys, base, save_model(tmp_path / "tuned", tuned, tokenizer__json='{"vocabulary": 2}'))


def test_single_files_and_unusual_values(tmp_path, capsys):
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-40, 3.0])
    base, tuned = save_model(tmp_path / "base", {"w": odd}), save_model(tmp_path / "tuned", {"w": -odd})
    run(capsys, "delta", base / "model.safetensors", tuned / "model.safetensors", tmp_path / "d.safetensors", "--force")
    run(capsys, "apply", base, tmp_path / "d.safetensors", tmp_path / "again")
    assert contents(tmp_path / "again") == {"model.safetensors": (tuned / "model.safetensors").read_bytes()}


def test_a_base_that_is_sharded_otherwise_will_do(tensors, tuned, tmp_path, capsys):
    base, made = save_model(tmp_path / "base", tensors), save_model(tmp_path / "tuned", tuned, 2)
    run(capsys, "delta", base, made, tmp_path / "d.safetensors")
    run(capsys, "apply", save_model(tmp_path / "other", tensors, 3), tmp_path / "d.safetensors", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(made)


def test_a_licence_that_is_not_there_is_left_out_and_named(tensors, tuned, tmp_path, capsys):
    base = save_model(tmp_path / "base", tensors, LICENSE="Mine")
    made = save_model(tmp_path / "tuned", tuned, LICENSE="Mine")
    run(capsys, "delta", base, made, tmp_path / "d.safetensors")
    (base / "LICENSE").unlink()
    assert "LICENSE was left out" in run(capsys, "apply", base, tmp_path / "d.safetensors", tmp_path / "again")


def test_most_entries_differ(tmp_path, capsys):
    base = save_model(tmp_path / "base", {"w": torch.randn(100, 100)})
    tuned = save_model(tmp_path / "tuned", {"w": torch.randn(100, 100)})
    said = complaint(capsys, "delta", base, tuned, tmp_path / "d.safetensors")
    assert re.search(r"100% of the entries of .*tuned differ .* \d\d,\d{3} bytes, .* 40,\d{3}\. --force writes", said)
    round_trip(capsys, base, tuned, "--force")


class TestWrongInput:
    @pytest.fixture
    def made(self, tensors, tuned, tmp_path, capsys) -> tuple[Path, Path, Path, Path]:
        """Base, tuned, their delta, and a folder's name that is free."""
        base, after = save_model(tmp_path / "base", tensors), save_model(tmp_path / "tuned", tuned)
        run(capsys, "delta", base, after, tmp_path / "d.safetensors")
        return base, after, tmp_path / "d.safetensors", tmp_path / "again"

    def test_another_base(self, made, tensors, tmp_path, capsys):
        base, _, delta, out = made
        tensors[LAYER.format(1)] = tensors[LAYER.format(1)] * 2  # which the delta does not change
        other = save_model(tmp_path / "other", tensors)
        said = complaint(capsys, "apply", other, delta, out)
        assert f"other is not the base, base, that {delta} was made from: {LAYER.format(1)} has other values" in said

    def test_the_tuned_model_is_not_the_base(self, made, capsys):
        _, tuned, delta, out = made
        assert "is not the base, base, that" in complaint(capsys, "apply", tuned, delta, out)

    def test_the_base_is_not_the_tuned_model(self, made, capsys):
        base, _, delta, out = made
        assert "is not the tuned model that" in complaint(capsys, "apply", "--remove", base, delta, out)

    def test_a_delta_of_another_model(self, made, tmp_path, capsys):
        _, _, delta, out = made
        other = save_model(tmp_path / "other", {"transformer.wte.weight": torch.randn(3, 4)})
        assert f"that {delta} was made from: it has no " in complaint(capsys, "apply", other, delta, out)

    def test_another_tokenizer(self, made, capsys):
        base, _, delta, out = made
        (base / "tokenizer.json").write_text("{}")
        assert "its tokenizer.json is missing or another one" in complaint(capsys, "apply", base, delta, out)

    def test_a_truncated_delta(self, made, capsys):
        base, _, delta, out = made
        delta.write_bytes(delta.read_bytes()[:-10])
        assert "is no complete safetensors file" in complaint(capsys, "apply", base, delta, out)

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
    def test_a_damaged_delta(self, share, made, capsys):
        base, _, delta, out = made
        content = bytearray(delta.read_bytes())
        content[int(share * len(content))] ^= 0x55
        delta.write_bytes(content)
        assert f"{delta} is damaged: copy it again" in complaint(capsys, "apply", base, delta, out)

    def test_a_file_that_is_no_delta(self, made, capsys):
        base, tuned, _, out = made
        assert "is no delta" in complaint(capsys, "apply", base, tuned / "model.safetensors", out)
        assert "is no file" in complaint(capsys, "apply", base, tuned, out)

    def test_what_exists_is_not_replaced(self, made, capsys):
        base, tuned, delta, _ = made
        before = contents(tuned), delta.read_bytes()
        assert "exists already" in complaint(capsys, "apply", base, delta, tuned)
        assert "exists already" in complaint(capsys, "delta", base, tuned, delta)
        assert (contents(tuned), delta.read_bytes()) == before

    def test_a_name_that_is_no_safetensors_file(self, made, tmp_path, capsys):
        base, tuned, _, _ = made
        assert "ends in .safetensors" in complaint(capsys, "delta", base, tuned, tmp_path / "delta.bin")

    def test_a_damaged_tuned_folder(self, made, tmp_path, capsys):
        base, tuned, _, _ = made
        file = tuned / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        assert "no complete safetensors file" in complaint(capsys, "delta", base, tuned, tmp_path / "e.safetensors")

    def test_a_disk_that_takes_no_more(self, made, tmp_path, capsys):
        base, tuned, delta, out = made
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            for words in (["delta", base, tuned, tmp_path / "e.safetensors"], ["apply", base, delta, out]):
                assert f"{words[-1]} could not be written (File too large)" in complaint(capsys, *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def test_dtypes_without_a_delta_between_them(self, tmp_path, capsys):
        base = save_model(tmp_path / "base", {"w": torch.ones(4), "v": torch.ones(4)})
        tuned = save_model(tmp_path / "tuned", {"w": torch.ones(4, dtype=torch.int8), "v": torch.ones(4)})
        said = complaint(capsys, "delta", base, tuned, tmp_path / "d.safetensors")
        assert "w is F32 in" in said and "I8 in" in said and "save both in one dtype" in said

    def test_a_path_out_of_the_folder_is_refused(self, made, tmp_path, capsys):
        base, tuned, _, out = made
        shutil.copytree(tuned, tmp_path / "evil")
        (tmp_path / "evil" / "xxescape").write_text("{}")
        run(capsys, "delta", base, tmp_path / "evil", tmp_path / "e.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            from gmt_tune.deltas import file_format

            plan = file_format.Plan.from_json
            patch.setattr(file_format.Plan, "from_json", lambda text: plan(text.replace("xxescape", "../escape")))
            assert "is damaged" in complaint(capsys, "apply", base, tmp_path / "e.safetensors", out)
        assert not (tmp_path / "escape").exists()


def test_a_folder_with_a_delta_alone_says_how_to_make_the_model(tensors, tuned, tmp_path, capsys):
    base, made = save_model(tmp_path / "base", tensors), save_model(tmp_path / "tuned", tuned)
    run(capsys, "delta", base, made, made / "delta.safetensors")
    run(capsys, "diff", base, made)  # beside weights, it is none
    (made / "model.safetensors").unlink()
    said = complaint(capsys, "diff", base, made)
    assert f"gmt-tune apply BASE {made}/delta.safetensors DIR" in said


@pytest.mark.parametrize("command", ["delta", "apply"])
def test_a_killed_command_leaves_nothing_under_the_final_name(command, tmp_path):
    weights = {f"layer{i}": torch.randn(1200, 1000) for i in range(12)}
    base = save_model(tmp_path / "base", weights)
    tuned = save_model(tmp_path / "tuned", {name: changed(weight, 0.05) for name, weight in weights.items()})
    out = tmp_path / ("d.safetensors" if command == "delta" else "again")
    if command == "apply":
        assert main(["delta", str(base), str(tuned), str(tmp_path / "d.safetensors")]) == 0
    arguments = {"delta": [base, tuned, out], "apply": [base, tmp_path / "d.safetensors", out]}[command]
    process = multiprocessing.get_context("forkserver").Process(
        target=run_command, args=([command, *map(str, arguments)],)
    )
    process.start()
    while process.is_alive() and not any(out.name in path.name and path != out for path in tmp_path.iterdir()):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    assert main([command, *map(str, arguments)]) == 0  # what is left is in nobody's way
    assert json.loads((out / "config.json").read_text()) if command == "apply" else out.is_file()
