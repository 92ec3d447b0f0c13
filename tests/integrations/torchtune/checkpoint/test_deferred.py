"""Weights that are written one after the other: the same files as torchtune's, and no two weights in memory."""

import json
import weakref
from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import save_file
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.mistral import mistral_classifier
from torchtune.models.phi3 import phi3
from torchtune.models.qwen2 import qwen2
from torchtune.training import FullModelHFCheckpointer

from gmt_tune.integrations.torchtune.checkpoint import deferred, model
from gmt_tune.integrations.torchtune.checkpoint.deferred import Deferred
from gmt_tune.integrations.torchtune.checkpoint.space import host_bytes_of_save

WORKER = Path(__file__).with_name("weights_worker.py")
DTYPES = [getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64", "int64", "uint8", "bool")]
SIZES = dict(vocab_size=40, num_layers=3, embed_dim=32, intermediate_dim=48, max_seq_len=16)
HEADS = {"num_heads": 4, "num_kv_heads": 2}
MODELS = {
    "LLAMA3_2": lambda: llama3_2(**SIZES, **HEADS),
    "PHI3_MINI": lambda: phi3(**SIZES, num_heads=4, num_kv_heads=4),
    "QWEN2": lambda: qwen2(**SIZES, **HEADS),
    "GEMMA2": lambda: gemma2(**SIZES, **HEADS, head_dim=8),
    "REWARD": lambda: mistral_classifier(num_classes=1, **SIZES, **HEADS),
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_is_that_of_safetensors_byte_for_byte(metadata, tmp_path):
    tensors = {f"layers.{i}.wéight": torch.randn(5, i + 1).to(dtype) for i, dtype in enumerate(DTYPES * 2)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), 'quoted "name"': torch.arange(7)}
    save_file(tensors, tmp_path / "wanted", metadata)
    deferred.save_file(tensors, tmp_path / "plain", metadata)
    deferred.save_file({name: deferred.as_deferred(t) for name, t in tensors.items()}, tmp_path / "deferred", metadata)
    wanted = (tmp_path / "wanted").read_bytes()
    assert (tmp_path / "plain").read_bytes() == wanted
    assert (tmp_path / "deferred").read_bytes() == wanted


class _FileOfEach(dict):
    """torchtune's ``_weight_map`` as if every third weight had been read from a second file."""

    def __missing__(self, name: str) -> str:
        return self.setdefault(name, f"{1 + (len(self) % 3 == 2):04}")


class _Watched:
    """Gives copies of weights, and notes how many that it gave before are still there."""

    def __init__(self) -> None:
        self._given: list[weakref.ref] = []
        self.alive: list[int] = []

    def give(self, weight: torch.Tensor) -> torch.Tensor:
        self.alive.append(sum(given() is not None for given in self._given))
        values = weight.numpy().copy()
        self._given.append(weakref.ref(values))
        return torch.from_numpy(values)


@pytest.mark.parametrize("kind", MODELS)
def test_a_models_files_are_those_of_torchtune_and_hold_one_weight_in_memory(kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    weights = {name: weight.detach() for name, weight in MODELS[kind]().state_dict().items()}
    given, out, watched = tmp_path / "model", tmp_path / "out", _Watched()
    given.mkdir()
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "tie_word_embeddings": False}
    (given / "config.json").write_text(json.dumps(config))
    (given / "model.safetensors").touch()
    checkpointer = FullModelHFCheckpointer(str(given), ["model.safetensors"], kind, str(out))
    checkpointer._weight_map = _FileOfEach()
    later = {
        name: Deferred.to_come(weight.shape, weight.dtype, lambda weight=weight: watched.give(weight))
        for name, weight in weights.items()
    }
    for name, written in (("deferred", later), ("plain", weights)):
        (tmp_path / name).mkdir()
        model.write_model(checkpointer, written, tmp_path / name, given)
    checkpointer.save_checkpoint({"model": weights}, epoch=0)
    wanted = {file.name: file.read_bytes() for file in (out / "epoch_0").iterdir()}
    del wanted["config.json"]  # ours names the dtype
    assert len(wanted) == 3
    for name in ("deferred", "plain"):
        files = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        del files["config.json"]
        assert files == wanted
    fused = 2 if kind == "PHI3_MINI" else 0  # queries, keys and values in one tensor
    assert len(watched.alive) == len(weights) and max(watched.alive) == fused


def test_what_would_change_a_weight_to_come_is_refused():
    later = deferred.as_deferred(torch.zeros(3))
    with pytest.raises(NotImplementedError, match="changes a tensor whose values are still to come"):
        torch.ones(3).copy_(later)


def test_ranks_give_their_parts_as_rank_0_asks_for_them_and_leave_after_an_error(tmp_path):
    launch.torchrun(WORKER, tmp_path, processes=2, log_dir=tmp_path / "logs")
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "processes, is_async, on_host, wanted",
    [
        (1, False, False, 2 * 3),
        (1, False, True, 3),  # converted; the others are written from where they are
        (4, False, True, 2 * 3),  # gathered and converted
        (1, True, False, 10 + 20 + 3),
        (4, True, True, 10 + 20 + 3),
    ],
)
def test_the_estimate_of_the_hosts_memory(processes, is_async, on_host, wanted):
    sizes = dict(weights=10, largest_weight=3, state=20, largest_state=5)
    assert host_bytes_of_save(**sizes, processes=processes, is_async=is_async, on_host=on_host) == wanted
