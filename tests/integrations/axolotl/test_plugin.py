"""The plugin in the real Axolotl: its loader, its validation of configs, its trainer, its command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl")

PLUGIN = "gmt_tune.integrations.axolotl.GradientMaskPlugin"
EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def validate():
    """Function that takes a config through Axolotl's plugin loader and validation, as its commands do."""
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    def validate(config: dict, **capabilities):
        cfg = DictDefault(config)
        prepare_plugins(cfg)
        return validate_config(cfg, **capabilities)

    return validate


def test_axolotls_loader_loads_the_plugin(validate, axolotl_config):
    from axolotl.integrations.base import PluginManager

    validate(axolotl_config())
    plugin = PluginManager.get_instance().plugins[PLUGIN]
    assert type(plugin).__name__ == "GradientMaskPlugin"


@pytest.mark.parametrize(
    "section",
    [
        {"density": 0.2},
        {"density": 1, "score": "saliency", "scope": "global", "refresh_every": 4, "dense": ["*norm*"], "seed": 3},
        {"density": 0.5, "refresh_every": None, "score": "random", "frozen": ["*embed*"]},
    ],
)
def test_a_section_reaches_the_mask_as_it_was_written(validate, axolotl_config, section):
    from gmt_tune.integrations.axolotl import GradientMaskPlugin

    cfg = validate(axolotl_config(gradient_mask=section))
    [callback] = GradientMaskPlugin().add_callbacks_pre_trainer(cfg, model=None)
    defaults = {"score": "magnitude", "scope": "tensor", "refresh_every": 1, "dense": [], "frozen": []}
    assert callback._options == {**defaults, "seed": 0, "error_if_nonfinite": True, **section}


@pytest.mark.parametrize(
    "section, sentence",
    [
        ({"density": 0.2, "refesh_every": 4}, "gradient_mask.refesh_every\n.*not permitted"),
        ({"density": 20}, "for 20.0 percent write 0.2"),
        ({"density": "0.2"}, "gradient_mask.density"),
        ({"density": True}, "gradient_mask.density"),
        ({"scope": "tensor"}, "gradient_mask.density\n.*[Ff]ield required"),
        ({"density": 0.2, "scope": "layer"}, "scope must be one of tensor, global"),
        ({"density": 0.2, "refresh_every": 0}, "refresh_every must be a whole number"),
        ({"density": 0.2, "dense": "*norm*"}, "gradient_mask.dense"),
        (..., "needs a section gradient_mask"),
    ],
)
def test_a_wrong_section_is_refused_by_axolotls_validation(validate, axolotl_config, section, sentence):
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match=sentence):
        validate(axolotl_config(gradient_mask=section))


def test_deepspeed_is_refused_and_fsdp2_named(validate, axolotl_config):
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="deepspeed keeps gradients.*fsdp_version: 2"):
        validate(axolotl_config(deepspeed={"zero_optimization": {"stage": 3}}))


@pytest.mark.parametrize("name", ["axolotl_llama3_1_8b", "axolotl_mistral_7b"])
def test_the_examples_pass_axolotls_validation(validate, name):
    cfg = validate(
        yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()),
        capabilities={"bf16": True, "tf32": True, "fp8": True, "n_gpu": 2, "n_node": 1, "compute_capability": "sm_90"},
        env_capabilities={"torch_version": "2.13.0"},
    )
    assert cfg.gradient_mask.density == 0.2 and cfg.fsdp_version == 2


def test_a_step_of_axolotls_trainer_moves_the_entries_that_a_full_sort_selects(
    axolotl_config, tmp_path, moves_only_selected
):
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer

    config = axolotl_config(optimizer="sgd", learning_rate=10.0, max_steps=1, save_strategy="no", save_steps=...)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cfg = load_cfg(str(tmp_path / "config.yaml"))

    def make(watch):
        trainer = setup_model_and_trainer(cfg, load_datasets(cfg=cfg))[0]
        trainer.add_callback(watch)
        return trainer

    moves_only_selected(make, density=0.2)


@pytest.mark.slow
def test_axolotl_train_runs_logs_saves_and_resumes(axolotl_config, tmp_path, same_bits):
    """The whole command on the CPU, undisturbed, and resumed inside a refresh interval."""
    from safetensors.torch import load_file

    def train(folder: Path, **changes):
        config = axolotl_config(
            gradient_mask={"density": 0.2, "refresh_every": 3}, output_dir=str(folder / "out"), max_steps=6, **changes
        )
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        process = subprocess.run(
            [str(Path(sys.executable).with_name("axolotl")), "train", "config.yaml"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=900,
            env=dict(os.environ),
        )
        output = process.stdout + process.stderr
        assert process.returncode == 0, output[-6000:]
        return output, load_file(folder / "out" / "model.safetensors")

    output, undisturbed = train(tmp_path / "a")
    assert output.count("'mask/density': '0.") == 6 and "Model successfully saved" in output
    assert (tmp_path / "a" / "out" / "checkpoint-4" / "gradient_mask.pt").is_file()
    _, resumed = train(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-4"))
    assert same_bits(undisturbed, resumed) == []
