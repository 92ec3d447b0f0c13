"""What a run says of its checkpoints: words that work when they are copied, and folders by the names that stay."""

import re
import shlex

import pytest
from omegaconf import OmegaConf

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.checkpoint import run_checkpoints
from gmt_tune.integrations.torchtune.config.check import check_config
from gmt_tune.integrations.torchtune.config.reading import apply_overrides

FORMATTED = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00001"}


@pytest.mark.parametrize("files", [["model.safetensors"], FORMATTED], ids=["list", "format"])
def test_a_finished_run_is_continued_by_the_words_of_its_message(files, tmp_path, tiny_world, tiny_config, run_recipe):
    model = tmp_path / "model"
    model.mkdir()
    for file in (tiny_world / "model").iterdir():
        name = file.name if isinstance(files, list) else file.name.replace("model.saf", "model-00001-of-00001.saf")
        (model / name).write_bytes(file.read_bytes())
    config = tiny_config(tmp_path / "out")
    config["checkpointer"] |= {"checkpoint_dir": str(model), "checkpoint_files": files}
    config["checkpointer"]["output_dir"] = "${output_dir}"
    run_recipe(config)
    with pytest.raises(UserError, match="is complete and kept no optimizer state") as refused:
        run_recipe({**config, "resume_from_checkpoint": True, "epochs": 2})
    words = shlex.split(str(refused.value).partition("without resume_from_checkpoint: ")[2])
    assert len(words) == (3 if isinstance(files, list) else 2)  # no more than it takes
    further = apply_overrides({**config, "epochs": 2}, words)
    check_config(further)
    recipe = run_recipe(OmegaConf.to_container(further, resolve=True))
    assert recipe.global_step == 8 and (tmp_path / "out_next" / "epoch_1").is_dir()


def test_files_that_are_counted_get_other_numbers_by_the_words_too(tmp_path, tiny_config, run_recipe, tiny_world):
    from gmt_tune.integrations.torchtune.checkpoint.finding import new_run_from
    from gmt_tune.integrations.torchtune.checkpoint.folder import newest_whole

    config = tiny_config(tmp_path / "out")
    run_recipe(config)
    config["checkpointer"]["checkpoint_files"] = {"filename_format": "model_{}_of_{}.bin", "max_filename": "0002"}
    found = newest_whole(tmp_path / "out", print)
    further = apply_overrides(config, shlex.split(new_run_from(found, OmegaConf.create(config))))
    check_config(further)


def test_lines_of_a_run_name_no_folder_that_is_not_there_at_its_end(tmp_path, tiny_config, run_tune):
    OmegaConf.save(tiny_config(tmp_path / "out", save_every_n_steps=2), tmp_path / "config.yaml")
    said = run_tune("run", "gmt_full_finetune", "--config", tmp_path / "config.yaml", cwd=tmp_path)
    assert f"Saved {tmp_path}/out/step_2." in said.stdout + said.stderr
    assert ".incomplete-" not in said.stdout + said.stderr
    named = re.findall(rf"{tmp_path}/out/[\w./-]*\w", said.stdout + said.stderr)
    assert named and all((tmp_path / path).exists() for path in named)


def test_a_checkpoint_that_cannot_be_written_is_called_by_its_final_name(
    tmp_path, tiny_config, run_recipe, monkeypatch
):
    def no_space(checkpointer, weights, folder, files_from):
        raise OSError(28, "No space left on device", str(folder / "model.safetensors"))

    monkeypatch.setattr(run_checkpoints, "write_model", no_space)
    with pytest.raises(UserError) as failed:
        run_recipe(tiny_config(tmp_path / "out"))
    assert f"No space left on device: '{tmp_path}/out/epoch_0/model.safetensors'" in str(failed.value)
