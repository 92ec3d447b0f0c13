"""``gmt-tune diff``: what changed, counted entry by entry, and one sentence for what cannot be compared."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gmt_tune.cli.main import main


def save(folder: Path, tensors: dict, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder


def as_json(capsys, *arguments) -> dict:
    assert main(["diff", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, *arguments) -> str:
    """What the command printed when it failed: one line, without a traceback."""
    assert main(["diff", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("gmt-tune: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def pair(tmp_path):
    """A base and a tuned folder of random tensors, with what changed counted independently."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for layer in range(3):
        for module, share in (("self_attn.q_proj", 0.2), ("mlp.down_proj", 0.5), ("input_layernorm", 0.0)):
            shape = (40,) if "norm" in module else (40, 50)
            before = torch.randn(shape, generator=generator)
            moved = torch.rand(shape, generator=generator) < share
            name = f"model.layers.{layer}.{module}.weight"
            base[name], tuned[name] = before, torch.where(moved, before + 0.1 * (layer + 1), before)
    return save(tmp_path / "base", base), save(tmp_path / "tuned", tuned), base, tuned


def test_every_number_is_what_whole_tensors_give(pair, capsys):
    base_dir, tuned_dir, base, tuned = pair
    found = as_json(capsys, base_dir, tuned_dir)
    assert found["tensors"].keys() == base.keys()
    for name, numbers in found["tensors"].items():
        change = (tuned[name] - base[name]).double()
        assert numbers["entries"] == change.numel()
        assert numbers["changed"] == int((tuned[name] != base[name]).sum())
        assert numbers["norm_of_change"] == pytest.approx(change.norm().item(), rel=1e-6)
        relative = (change.norm() / base[name].double().norm()).item()
        assert numbers["relative_change"] == pytest.approx(relative, rel=1e-6)
        assert numbers["largest_change"] == pytest.approx(change.abs().max().item(), rel=1e-6)
    q_names = [name for name in base if "q_proj" in name]
    by_module = found["by_module"]["self_attn.q_proj"]
    assert by_module["tensors"] == 3 and by_module["changed"] == sum(int((tuned[n] != base[n]).sum()) for n in q_names)
    assert found["by_layer"].keys() == {"0", "1", "2"}
    total = math.sqrt(sum(((tuned[n] - base[n]).double() ** 2).sum().item() for n in base))
    assert found["total"]["norm_of_change"] == pytest.approx(total, rel=1e-6)


def test_sharding_and_slices_do_not_change_the_answer(pair, tmp_path, capsys, monkeypatch):
    base_dir, tuned_dir, _, tuned = pair
    whole = as_json(capsys, base_dir, tuned_dir)
    names = list(tuned)
    sharded = save(tmp_path / "sharded", {n: tuned[n] for n in names[:4]}, "model-00001-of-00002.safetensors")
    save(sharded, {n: tuned[n] for n in names[4:]}, "model-00002-of-00002.safetensors")
    monkeypatch.setattr("gmt_tune.reporting.diff._SLICE", 7)  # entries: splits single rows
    found = as_json(capsys, base_dir, sharded)
    for name, numbers in whole["tensors"].items():
        for key, value in numbers.items():
            assert found["tensors"][name][key] == pytest.approx(value, rel=1e-5), (name, key)


def test_the_table_has_what_moved_most_on_top(pair, capsys):
    base_dir, tuned_dir, _, _ = pair
    assert main(["diff", str(base_dir), str(tuned_dir), "--top", "2"]) == 0
    text = capsys.readouterr().out
    moved = text[text.index("moved most") :].splitlines()
    assert len(moved) == 3 and "layers.2.mlp.down_proj" in moved[1] and "layers.1.mlp.down_proj" in moved[2]
    row = next(line for line in text.splitlines() if line.startswith("input_layernorm")).split()
    assert row == ["input_layernorm", "3", "120", "0.00%", "0", "0", "0"]


def test_every_tensor_is_listed_on_request(pair, capsys):
    base_dir, tuned_dir, base, tuned = pair
    assert main(["diff", str(base_dir), str(tuned_dir), "--tensors"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    for name in base:
        changed = (tuned[name] != base[name]).float().mean().item()
        assert rows[name][3] == f"{changed:.2%}"


def test_pictures_are_written(pair, tmp_path, capsys):
    base_dir, tuned_dir, _, _ = pair
    html, png = tmp_path / "diff.html", tmp_path / "png"
    assert main(["diff", str(base_dir), str(tuned_dir), "--html", str(html), "--png", str(png)]) == 0
    assert f"Wrote {html}" in capsys.readouterr().out
    assert {path.stem for path in png.iterdir()} == {"changed", "relative", "moved-most"}
    text = html.read_text()
    assert '<figure class="card" id="moved-most">' in text and "<script" not in text


def test_tilde_is_the_home_folder_in_every_path(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["diff", "~/base", "~/tuned", "--html=~/diff.html", "--png=~/png"]) == 0
    assert (tmp_path / "diff.html").is_file() and list((tmp_path / "png").glob("*.png"))
    assert not (tmp_path / "~").exists()


def test_rounding_to_another_dtype_is_no_change(tmp_path, capsys):
    before = torch.randn(64, 64)
    after = before.clone()
    after[:16] *= 2
    base = save(tmp_path / "base", {"w": before})
    tuned = save(tmp_path / "tuned", {"w": after.bfloat16()})
    found = as_json(capsys, base, tuned)
    assert found["tensors"]["w"]["fraction_changed"] == 0.25
    assert "1 tensors are F32 in BASE and BF16 in TUNED" in found["notes"][0]


def test_nan_and_infinity_are_counted_and_in_no_norm(tmp_path, capsys):
    before, after = torch.ones(8), torch.ones(8)
    after[0], after[1], after[2] = math.nan, math.inf, 3.0
    before[3] = after[3] = math.nan  # NaN on both sides: nothing changed
    found = as_json(capsys, save(tmp_path / "a", {"w": before}), save(tmp_path / "b", {"w": after}))["tensors"]["w"]
    assert (found["changed"], found["nonfinite"], found["norm_of_change"]) == (3, 3, 2.0)


def test_tied_embeddings_are_counted_once(tmp_path, capsys):
    embedding = torch.randn(10, 4)
    base = save(tmp_path / "base", {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()})
    tuned = save(tmp_path / "tuned", {"model.embed_tokens.weight": embedding + 1})
    for folder in (base, tuned):
        (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    found = as_json(capsys, base, tuned)
    assert found["total"]["entries"] == 40 and "second copy of the embedding" in found["notes"][0]


def test_names_on_one_side_and_other_shapes_are_reported(tmp_path, capsys):
    base = save(tmp_path / "base", {"w": torch.ones(4), "v": torch.ones(2, 3), "old": torch.ones(1)})
    tuned = save(tmp_path / "tuned", {"w": torch.ones(4), "v": torch.ones(3, 2), "new": torch.ones(1)})
    found = as_json(capsys, base, tuned)
    assert found["only_in_base"] == ["old"] and found["only_in_tuned"] == ["new"] and found["reshaped"] == ["v"]
    assert "v was not compared: its shape is 2 x 3 in BASE, 3 x 2 in TUNED." in found["notes"]


def test_folders_of_which_no_shape_fits_are_refused(tmp_path, capsys):
    base = save(tmp_path / "base", {"w": torch.ones(4)})
    tuned = save(tmp_path / "tuned", {"w": torch.ones(5)})
    message = complaint(capsys, base, tuned)
    assert "w" in message and "4" in message and "5" in message and "same model" in message


def test_what_cannot_be_compared_is_reported_in_one_sentence(pair, tmp_path, capsys):
    base, tuned, tensors, _ = pair
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "does not exist" in complaint(capsys, base, tmp_path / "nowhere")
    assert "holds no *.safetensors: name a model's folder" in complaint(capsys, base, empty)
    (empty / "my.yaml").write_text("a: 1")
    assert "my.yaml is no safetensors file: name a folder" in complaint(capsys, base, empty / "my.yaml")
    (empty / "model.bin").write_bytes(b"x")
    assert "only PyTorch files" in complaint(capsys, base, empty)
    cut = tmp_path / "cut"
    cut.mkdir()
    content = (tuned / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "is no complete safetensors file" in complaint(capsys, base, cut)
    (cut / "model.safetensors").write_bytes(b"")
    assert "is no complete safetensors file" in complaint(capsys, base, cut)
    other = save(tmp_path / "other", {"transformer.h.0.weight": torch.ones(3)})
    assert "have no tensor in common" in complaint(capsys, base, other)
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00001-of-00001.safetensors" in complaint(capsys, base, other)
    (other / "model.safetensors.index.json").write_text("{")
    assert "is no index of safetensors files" in complaint(capsys, base, other)


_PEAK = """
import resource, sys
from gmt_tune.cli.main import main
status = main(["diff", *sys.argv[1:]])
print("PEAK_KIB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.slow
def test_two_folders_of_a_billion_parameters_take_less_than_two_gibibytes(tmp_path):
    """Llama-3.2-1B's shapes in bf16, random, in two shards each."""
    folders = [tmp_path / name for name in ("base", "tuned")]
    try:
        for seed, folder in enumerate(folders):
            subprocess.run([sys.executable, "-c", _WRITE_1B, folder, str(seed)], check=True)
        assert sum(f.stat().st_size for f in folders[0].iterdir()) > 2 * 10**9
        command = [sys.executable, "-c", _PEAK, *map(str, folders)]
        process = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        peak = int(re.search(r"PEAK_KIB (\d+)", process.stdout)[1]) / 2**20
        print(f"peak memory: {peak:.2f} GiB")
        assert peak < 2.0
    finally:
        for folder in folders:
            for file in folder.glob("*"):
                file.unlink()


_WRITE_1B = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()
generator = torch.Generator().manual_seed(seed)
def tensor(*shape):
    return torch.randint(-30000, 16000, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)
for shard in range(2):
    tensors = {"model.embed_tokens.weight": tensor(128256, 2048)} if shard == 0 else {}
    for i in range(8 * shard, 8 * shard + 8):
        prefix = f"model.layers.{i}."
        for name, shape in (("self_attn.q_proj", (2048, 2048)), ("self_attn.k_proj", (512, 2048)),
                            ("self_attn.v_proj", (512, 2048)), ("self_attn.o_proj", (2048, 2048)),
                            ("mlp.gate_proj", (8192, 2048)), ("mlp.up_proj", (8192, 2048)),
                            ("mlp.down_proj", (2048, 8192))):
            tensors[f"{prefix}{name}.weight"] = tensor(*shape)
    save_file(tensors, folder / f"model-{shard + 1:05d}-of-00002.safetensors")
"""
