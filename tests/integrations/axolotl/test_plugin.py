"""The plugin in the real Axolotl: its loader, its validation of configs, its trainer, its command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl", reason="axolotl is not installed: requirements.txt beside this file says how")

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
        {"density": 1, "score": "saliency", "scope": "global", "refresh_every": 4, "dense": ["*bias"], "seed": 3},
        {"density": 0.5, "refresh_every": None, "score": "random", "frozen": ["*embed*"], "dense": None},
    ],
)
def test_a_section_reaches_the_mask_as_it_was_written(validate, axolotl_config, section):
    from gmt_tune.integrations.axolotl import GradientMaskPlugin

    cfg = validate(axolotl_config(gradient_mask=section))
    [callback] = GradientMaskPlugin().add_callbacks_pre_trainer(cfg, model=None)
    defaults = {"score": "magnitude", "scope": "tensor", "refresh_every": 1, "dense": ["*norm*"], "frozen": []}
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
        ({"density": 0.2, "track_selection_every": 0}, "track_selection_every must be a whole number"),
        ({"density": 0.2, "state_bits": 8}, "state_bits and bf16_stochastic_round are those of CompactAdamW"),
        ({"density": 0.2, "compact": True, "scope": "global"}, "scope 'global' does not work with CompactAdamW"),
        ({"density": 0.2, "compact": "yes"}, "gradient_mask.compact"),
        (..., "needs a section gradient_mask"),
    ],
)
def test_a_wrong_section_is_refused_by_axolotls_validation(validate, axolotl_config, section, sentence):
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match=sentence):
        validate(axolotl_config(gradient_mask=section))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"optimizer": "lion_8bit"}, "compact=True has no counterpart of optim='lion_8bit'"),
        ({"fp16": True}, "fp16 scales gradients.*set bf16: true"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "before DeepSpeed reduces them.*fsdp_version: 2"),
    ],
)
def test_what_a_compact_optimizer_cannot_do_is_refused(validate, axolotl_config, settings, sentence):
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match=sentence):
        validate(axolotl_config(gradient_mask={"density": 0.2, "compact": True}, **settings))


@pytest.mark.parametrize("version", [{}, {"fsdp_version": 1}, {"fsdp_config": {"fsdp_version": 1}}])
def test_fsdp_version_1_is_refused_and_2_named(validate, axolotl_config, version):
    """A version that is left out is 1 to Axolotl."""
    from pydantic import ValidationError

    fsdp = {"fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **version.pop("fsdp_config", {})}, **version}
    with pytest.raises(ValidationError, match="FSDP version 1 flattens.*fsdp_version: 2"):
        validate(axolotl_config(**fsdp))


def test_the_yaml_of_the_documentation_passes_axolotls_validation(validate, axolotl_config):
    page = (EXAMPLES.parent / "docs" / "integrations.md").read_text()
    blocks = re.findall(r"```yaml tested-by=tests/integrations/axolotl/test_plugin.py\n(.*?)```", page, re.DOTALL)
    cfgs = [validate(axolotl_config(**yaml.safe_load(block))) for block in blocks]
    assert [(cfg.gradient_mask.density, cfg.gradient_mask.compact) for cfg in cfgs] == [(0.2, False), (0.05, True)]
    assert all(cfg.plugins == [PLUGIN] for cfg in cfgs)


@pytest.mark.parametrize("name", ["axolotl_llama3_1_8b", "axolotl_mistral_7b"])
def test_the_examples_pass_axolotls_validation(validate, name):
    cfg = validate(
        yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text()),
        capabilities={"bf16": True, "tf32": True, "fp8": True, "n_gpu": 2, "n_node": 1, "compute_capability": "sm_90"},
        env_capabilities={"torch_version": "2.13.0"},
    )
    assert cfg.gradient_mask.density == 0.2 and cfg.fsdp_version == 2


def test_the_compact_example_passes_axolotls_validation(validate):
    cfg = validate(
        yaml.safe_load((EXAMPLES / "axolotl_llama3_1_8b_compact.yaml").read_text()),
        capabilities={"bf16": True, "tf32": True, "fp8": True, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_90"},
        env_capabilities={"torch_version": "2.13.0"},
    )
    assert cfg.gradient_mask.compact and cfg.gradient_mask.density == 0.05 and cfg.max_grad_norm == 1.0


@pytest.fixture
def make_axolotl_trainer(tmp_path):
    """Function that makes Axolotl's trainer of a config, as ``axolotl train`` does, and adds a callback."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import setup_model_and_trainer

    def make(config, callback):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        cfg = load_cfg(str(tmp_path / "config.yaml"))
        load = load_preference_datasets if cfg.rl else load_datasets
        trainer = setup_model_and_trainer(cfg, load(cfg=cfg))[0]
        trainer.add_callback(callback)
        return trainer

    return make


ONE_SGD_STEP = {"optimizer": "sgd", "learning_rate": 10.0, "max_steps": 1, "save_strategy": "no", "save_steps": ...}


def test_a_step_of_axolotls_trainer_moves_the_entries_that_a_full_sort_selects(
    axolotl_config, make_axolotl_trainer, moves_only_selected
):
    config = axolotl_config(**ONE_SGD_STEP)
    moves_only_selected(lambda watch: make_axolotl_trainer(config, watch), density=0.2)


def test_a_step_of_axolotls_dpo_trainer_moves_the_entries_that_a_full_sort_selects(
    axolotl_config, make_axolotl_trainer, moves_only_selected, tmp_path
):
    rows = [{"prompt": f"What is {i} plus 1?", "chosen": f" It is {i + 1}.", "rejected": " No."} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"path": str(tmp_path / "pairs.jsonl"), "ds_type": "json", "split": "train", "type": "passthrough"}
    config = axolotl_config(rl="dpo", datasets=[pairs], **ONE_SGD_STEP)
    moves_only_selected(lambda watch: make_axolotl_trainer(config, watch), density=0.2)


def test_axolotls_trainer_trains_compactly(axolotl_config, make_axolotl_trainer):
    from transformers import TrainerCallback

    from gmt_tune import CompactAdamW

    section = {"density": 0.2, "refresh_every": 3, "compact": True, "state_bits": 4}
    trainer = make_axolotl_trainer(axolotl_config(gradient_mask=section, max_grad_norm=0.5), TrainerCallback())
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert isinstance(optimizer, CompactAdamW) and optimizer.state_bits == 4
    assert len(logs) == 4 and logs[-1]["grad_norm"] == optimizer.grad_norm.item()


@pytest.mark.slow
@pytest.mark.parametrize("compact", [False, True])
def test_axolotl_train_runs_logs_saves_and_resumes(axolotl_config, tmp_path, same_bits, compact):
    """The whole command on the CPU, undisturbed, and resumed inside a refresh interval."""
    from safetensors.torch import load_file

    def train(folder: Path, **changes):
        section = {"density": 0.2, "refresh_every": 3, "compact": compact}
        config = axolotl_config(gradient_mask=section, output_dir=str(folder / "out"), max_steps=6, **changes)
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        commands = Path(sys.executable).parent  # among them accelerate, which axolotl starts by its name
        process = subprocess.run(
            [str(commands / "axolotl"), "train", "config.yaml"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"},
        )
        output = process.stdout + process.stderr
        assert process.returncode == 0, output[-6000:]
        return output, load_file(folder / "out" / "model.safetensors")

    output, undisturbed = train(tmp_path / "a")
    assert output.count("'mask/density': '0.") == 6 and "Model successfully saved" in output
    assert (tmp_path / "a" / "out" / "checkpoint-4" / "gradient_mask.pt").is_file()
    _, resumed = train(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-4"))
    assert same_bits(undisturbed, resumed) == []
