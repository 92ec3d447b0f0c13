"""The checkpointer of families whose weights torchtune does not map."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, some_tokens
from torchtune import training

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint.model import write_model
from gmt_tune.models import FullModelHFCheckpointer

TIED = FAMILIES["qwen3 tied"]


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("QWEN_2", r"is QWEN_2, which is no model type of torchtune and no module .*: did you mean QWEN2\?"),
        ("Something", r"No module named 'Something'\): set it to one such as LLAMA3, or to a module with hf_to_tune"),
        ("gmt_tune.models.qwen33", r"No module named 'gmt_tune.*\): did you mean gmt_tune\.models\.qwen3\?"),
        ("gmt_tune.models.smollm2", "a module without hf_to_tune and tune_to_hf: name one of"),
        (["QWEN2"], r"is \['QWEN2'\], which is no model type of torchtune"),
        (None, "is None, which is no model type of torchtune"),
    ],
)
def test_a_wrong_model_type_is_one_sentence(model_type, message, tmp_path):
    with pytest.raises(UserError, match=f"checkpointer.model_type.*{message}"):
        FullModelHFCheckpointer(str(tmp_path), ["model.safetensors"], model_type, str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["gemma2", "qwen3 tied"])
@pytest.mark.parametrize("own_file", [False, True], ids=["in a file", "in a file of its own"])
def test_a_copy_of_tied_embeddings_is_read_past_and_not_written(name, own_file, tmp_path):
    """Qwen3-1.7B has one in a file of its own, which nothing would be left for."""
    family, tokens = FAMILIES[name], some_tokens()
    theirs = family.hf()
    theirs.save_pretrained(tmp_path / "hf")
    first = tmp_path / "hf" / "model.safetensors"
    weights = load_file(first)
    copy = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    if own_file:
        names = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
        first.rename(tmp_path / "hf" / names[0])
        save_file(copy, tmp_path / "hf" / names[1], {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, names[0]) | dict.fromkeys(copy, names[1])}
        (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights | copy, first, {"format": "pt"})
    reader = family.reader(tmp_path / "hf", tmp_path / "out")
    ours = family.build()
    ours.load_state_dict(reader.load_checkpoint()["model"])
    (tmp_path / "saved").mkdir()
    write_model(reader, ours.state_dict(), tmp_path / "saved", tmp_path / "hf")
    (written,) = (tmp_path / "saved").glob("*.safetensors")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())["weight_map"]
    assert load_file(written).keys() == index.keys() == weights.keys()
    loaded = type(theirs).from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_a_module_of_the_users_gets_the_weights_and_the_config(tmp_path, monkeypatch):
    """With a config.json that has sizes by names of its own."""
    (tmp_path / "my_family.py").write_text(
        "def hf_to_tune(weights, config):\n"
        "    assert config == {'model_type': 'mine', 'width': 3}\n"
        "    return {f'my.{name}': weight.T for name, weight in weights.items()}\n"
        "def tune_to_hf(weights, config):\n"
        "    return {name.removeprefix('my.'): weight.T for name, weight in weights.items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_family", raising=False)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "width": 3}))
    weights = {"a": torch.randn(2, 3), "b": torch.randn(3, 1)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    reader = FullModelHFCheckpointer(str(folder), ["model.safetensors"], "my_family", str(tmp_path / "out"))
    read = reader.load_checkpoint()["model"]
    assert {name: tuple(weight.shape) for name, weight in read.items()} == {"my.a": (3, 2), "my.b": (1, 3)}
    (tmp_path / "saved").mkdir()
    write_model(reader, read, tmp_path / "saved", folder)
    (written,) = (tmp_path / "saved").glob("*.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in load_file(written).items())


@pytest.mark.parametrize(
    ("there", "back", "wrong"),
    [
        ("weights", "{'c': weights['a']}", r"makes c \[2, 3\] of what"),
        ("{'my.a': weights['a']}", "weights", r"makes my\.a \[2, 3\] of what"),
        ("weights", "{'a': weights['a'].T}", r"makes a \[3, 2\] of what"),
        ("weights", "{'a': weights['a']}", "leaves out entries .* does not make b"),
    ],
)
def test_functions_that_are_not_inverse_are_noticed_when_weights_are_read(there, back, wrong, tmp_path, monkeypatch):
    (tmp_path / "not_inverse.py").write_text(
        f"def hf_to_tune(weights, config):\n    return {there}\ndef tune_to_hf(weights, config):\n    return {back}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "not_inverse", raising=False)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.randn(2, 3), "b": torch.randn(4)}, folder / "model.safetensors")
    reader = FullModelHFCheckpointer(str(folder), ["model.safetensors"], "not_inverse", str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"not_inverse: tune_to_hf {wrong}"):
        reader.load_checkpoint()


def test_a_model_type_of_torchtunes_is_left_to_torchtune(tmp_path):
    family = FAMILIES["qwen2_5"]
    family.hf().save_pretrained(tmp_path / "hf")
    arguments = (str(tmp_path / "hf"), ["model.safetensors"], "QWEN2", str(tmp_path / "out"))
    ours, other = (
        checkpointer(*arguments).load_checkpoint()["model"]
        for checkpointer in (FullModelHFCheckpointer, training.FullModelHFCheckpointer)
    )
    assert ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)


def test_another_output_layer_beside_tied_embeddings_is_refused(tmp_path):
    TIED.hf().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(UserError, match="uses its embeddings as the output layer, but the files in .*lm_head.weight"):
        TIED.reader(tmp_path / "hf", tmp_path / "out").load_checkpoint()


@pytest.fixture
def split_family(tmp_path, monkeypatch):
    """Function that writes a module whose files hold two weights in one; ``line`` puts them together again."""

    def write(line: str):
        (tmp_path / "split_family.py").write_text(
            "import torch\n"
            "def hf_to_tune(weights, config):\n"
            "    return dict(zip(('a', 'b'), weights['ab'].split([2, 4])), c=weights['c1'])\n"
            "def tune_to_hf(weights, config):\n"
            f"    {line}\n"
            "    first, second = weights['c'].chunk(2)\n"
            "    return {'ab': ab, 'c1': torch.cat([first, second])}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "split_family", raising=False)
        folder = tmp_path / "hf"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        weights = {"ab": torch.randn(6, 3), "c1": torch.randn(4, 3)}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        reader = FullModelHFCheckpointer(str(folder), ["model.safetensors"], "split_family", str(tmp_path / "out"))
        return reader, weights

    return write


def test_weights_may_be_split_and_joined_on_their_way_to_a_file(split_family, tmp_path):
    reader, weights = split_family("ab = torch.cat([weights['a'], weights['b']])")
    loaded = reader.load_checkpoint()["model"]
    assert {name: len(weight) for name, weight in loaded.items()} == {"a": 2, "b": 4, "c": 4}
    (tmp_path / "saved").mkdir()
    write_model(reader, loaded, tmp_path / "saved", tmp_path / "hf")
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in load_file(file).items())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ab = torch.cat([weights['a'], weights['b']]).mul_(1)", "changes a tensor in place: make a new one"),
        ("ab = weights['ab']", "KeyError: 'ab'"),
    ],
)
def test_what_would_end_the_first_save_is_refused_when_a_model_is_loaded(line, message, split_family):
    reader, _ = split_family(line)
    with pytest.raises(UserError, match=f"split_family: tune_to_hf fails .*{message}"):
        reader.load_checkpoint()
