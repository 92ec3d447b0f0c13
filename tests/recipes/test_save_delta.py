"""`save_delta`: the recipe writes what an epoch changed, of which `gmt-tune apply` makes the whole folder again."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from model_folders import contents
from omegaconf import OmegaConf

from gmt_tune.cli.main import main
from gmt_tune.deltas import Delta
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint.manifest import MANIFEST, read_checkpoint
from gmt_tune.integrations.torchtune.config.check import check_config

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.05, "dense": ["*norm*"], "refresh_every": None}
COMPACT = {"_component_": "gmt_tune.CompactAdamW", "lr": 1e-3}
OF_THE_RUN = (MANIFEST, "delta.safetensors", "README.md")  # the card, once more at the end of the run


@pytest.fixture
def config(tiny_config, tmp_path):
    """Function that gives the config of two epochs of two steps with a fixed selection."""

    def make(**changes) -> dict:
        options = {"max_steps_per_epoch": 2, "epochs": 2, "optimizer": COMPACT, **changes}
        return tiny_config(tmp_path / "out", gradient_mask=MASK, **options)

    return make


def apply(config: dict, folder: Path, out: Path) -> dict[str, bytes]:
    """The folder that base and delta give, without what a run says of itself."""
    base = config["checkpointer"]["checkpoint_dir"]
    assert main(["apply", base, str(folder / "delta.safetensors"), str(out)]) == 0
    return model_of(out)


def model_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if not name.startswith("training_state")
            and name not in OF_THE_RUN}  # fmt: skip


@pytest.mark.parametrize("in_background", [False, True])
def test_each_epoch_has_a_delta_beside_its_weights(in_background, config, tmp_path, run_recipe, caplog):
    made = config(save_delta=True, enable_async_checkpointing=in_background, save_every_n_steps=1)
    run_recipe(made)
    for name in ("epoch_0", "epoch_1"):
        folder = tmp_path / "out" / name
        assert apply(made, folder, tmp_path / name) == model_of(folder)
        assert read_checkpoint(folder).damage() is None and "delta.safetensors" in read_checkpoint(folder).files
        assert "delta.safetensors" not in read_checkpoint(folder).progress.model_files
    assert not (tmp_path / "out" / "step_1" / "delta.safetensors").exists()
    changed = [pair.changed for pair in Delta(tmp_path / "out" / "epoch_1" / "delta.safetensors").plan.pairs]
    assert 0 < sum(changed) < 0.08 * 2**20
    assert "epoch_1/delta.safetensors: " in caplog.text and " of the weights' " in caplog.text


def test_only_keeps_no_whole_weights_of_the_last_epoch(config, tmp_path, run_recipe, capsys):
    run_recipe(config())
    shutil.move(tmp_path / "out", tmp_path / "whole")
    made = config(save_delta="only")
    run_recipe(made)
    folder = tmp_path / "out" / "epoch_1"
    assert not [name for name in contents(folder) if "model" in name]
    assert (tmp_path / "out" / "epoch_0" / "model-00001-of-00001.safetensors").is_file()  # which a run can go on from
    assert apply(made, folder, tmp_path / "again") == model_of(tmp_path / "whole" / "epoch_1")
    assert "gmt-tune apply BASE delta.safetensors DIR" in ModelCard.load(folder / "README.md").text
    assert read_checkpoint(folder).damage() is None

    run_recipe({**made, "resume_from_checkpoint": True})  # complete: nothing to do
    with pytest.raises(
        UserError, match=r"checkpoint_dir=DIR .* after `gmt-tune apply .*epoch_1/delta.safetensors DIR`"
    ):
        run_recipe({**made, "resume_from_checkpoint": True, "epochs": 3})


def test_a_run_that_moves_everything_keeps_its_weights_and_says_so(config, tmp_path, run_recipe, caplog):
    made = config(save_delta="only", epochs=1, optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-3})
    made.pop("gradient_mask")
    run_recipe(made)
    folder = tmp_path / "out" / "epoch_0"
    assert "epoch_0 has whole weights and no delta.safetensors: " in caplog.text
    assert ".incomplete-" not in caplog.text
    assert (folder / "model-00001-of-00001.safetensors").is_file() and not (folder / "delta.safetensors").exists()


@pytest.mark.parametrize(
    "checkpointer",
    [{"_component_": "torchtune.training.FullModelTorchTuneCheckpointer"}, {"safe_serialization": False}],
)
def test_other_formats_are_refused(checkpointer, config):
    made = config(save_delta=True)
    made["checkpointer"] |= checkpointer
    with pytest.raises(UserError, match="save_delta: True needs a checkpointer that writes safetensors"):
        check_config(OmegaConf.create(made))
    with pytest.raises(UserError, match="save_delta must be one of False, True, only"):
        check_config(OmegaConf.create(config(save_delta="yes")))
