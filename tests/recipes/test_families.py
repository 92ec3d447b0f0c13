"""What the recipe saves of each family loads in transformers, and computes what was trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from slow_cases import slow_where
from tiny_families import FAMILIES, Family
from torchtune.training import FullModelHFCheckpointer

SGD = {"_component_": "torch.optim.SGD", "lr": 0.01}
MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "refresh_every": 1, "dense": []}


@pytest.fixture
def config_of(tmp_path, tiny_world, tiny_config):
    """Function that gives the config of a run on a tiny model of a family, with the tokenizer of the tiny world."""

    def make(family: Family, **changes) -> dict:
        folder = tmp_path / "model"
        if not folder.exists():
            vocab_size = json.loads((tiny_world / "model" / "config.json").read_text())["vocab_size"]
            family.hf(vocab_size=vocab_size, max_position_embeddings=256).save_pretrained(folder)
            shutil.copy(tiny_world / "model" / "tokenizer.json", folder)
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        config = tiny_config(
            tmp_path / "out",
            max_steps_per_epoch=2,
            **{"gradient_mask": MASK, "enable_async_checkpointing": True, **changes},
        )
        config["model"] = family.section(vocab_size=vocab_size, max_seq_len=256)
        package = "torchtune.training" if family.checkpointer is FullModelHFCheckpointer else "gmt_tune.models"
        config["checkpointer"].update(
            _component_=f"{package}.FullModelHFCheckpointer", checkpoint_dir=str(folder), model_type=family.model_type
        )
        return config

    return make


def saved_and_trained(family: Family, recipe, folder: Path):
    """transformers' logits of a saved folder, and those of the model that was trained."""
    tokens = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    loaded = type(family.hf()).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        trained = recipe._model.eval()(tokens)
        return loaded(tokens).logits, torch.cat(trained, dim=1) if isinstance(trained, list) else trained


QUICK = ("gemma2", "mistral_v0_3", "phi4", "qwen2_5", "qwen3")


@pytest.mark.parametrize("name", slow_where(lambda name: name not in QUICK, FAMILIES))
def test_a_saved_model_loads_in_transformers_with_the_logits_of_the_trained_one(name, config_of, tmp_path, run_recipe):
    family = FAMILIES[name]
    recipe = run_recipe(config_of(family))
    saved, trained = saved_and_trained(family, recipe, tmp_path / "out" / "epoch_0")
    torch.testing.assert_close(saved, trained, rtol=0, atol=1e-4)
    before, _ = saved_and_trained(family, recipe, tmp_path / "model")
    assert (saved - before).abs().max() > 0.01


def weights_in(folder: Path) -> dict:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_soft_capped_logits_are_trained_on_as_well_without_holding_all_of_them(config_of, tmp_path, run_recipe):
    family, found = FAMILIES["gemma2"], []
    for loss in ("torchtune.modules.loss.CEWithChunkedOutputLoss", "gmt_tune.models.losses.LinearCrossEntropyLoss"):
        # Without a mask, which differences of rounding change
        run_recipe(config_of(family, loss={"_component_": loss}, optimizer=SGD, gradient_mask=None))
        found.append(weights_in(tmp_path / "out" / "epoch_0"))
        shutil.rmtree(tmp_path / "out")
    before = weights_in(tmp_path / "model")
    for name, weight in found[0].items():
        change = (weight - before[name]).norm()
        assert change > 0 and (found[1][name] - weight).norm() < 1e-4 * change, name


def test_a_run_goes_on_from_its_checkpoint_of_a_family_of_ours(config_of, tmp_path, run_recipe):
    family = FAMILIES["qwen3 tied"]
    run_recipe(config_of(family, save_every_n_steps=1))
    whole = weights_in(tmp_path / "out" / "epoch_0")
    shutil.rmtree(tmp_path / "out" / "epoch_0")
    run_recipe(config_of(family, save_every_n_steps=1, resume_from_checkpoint=True))
    again = weights_in(tmp_path / "out" / "epoch_0")
    assert again.keys() == whole.keys() and all(torch.equal(weight, whole[name]) for name, weight in again.items())
