"""The five verbs of the real ``tune`` command, and what importing torch costs because of us."""

import os
import subprocess
import sys

import pytest
import yaml

from gmt_tune.integrations.torchtune.plugin.registry import config_paths

CONFIG = "smollm2/135M_gmt_cpu"


def test_ls_shows_the_recipe_and_its_configs(run_tune, tmp_path):
    process = run_tune("ls", cwd=tmp_path)
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("gmt_full_finetune "))
    configs = [line.split()[-1] for line in lines[start:]]
    assert CONFIG in configs and "quickstart" in configs
    dpo = next(i for i, line in enumerate(lines) if line.startswith("gmt_full_dpo "))
    assert "quickstart_dpo" in [line.split()[-1] for line in lines[dpo:]]
    assert "quickstart_dpo" not in configs[: dpo - start]
    assert any(line.startswith("full_finetune_distributed ") for line in lines)


def test_cat_and_validate_take_our_configs(run_tune, tmp_path):
    shown = run_tune("cat", CONFIG, cwd=tmp_path).stdout
    assert yaml.safe_load(shown)["gradient_mask"]["_component_"] == "gmt_tune.GradientMask"
    (tmp_path / "mine.yaml").write_text(shown)
    assert "well-formed" in run_tune("validate", "mine.yaml", cwd=tmp_path).stdout


def test_validate_names_a_misspelt_mask_key(run_tune, tmp_path):
    text = config_paths()[CONFIG].read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("  density:", "  densty:"))
    process = run_tune("validate", "mine.yaml", cwd=tmp_path, check=False)
    assert process.returncode != 0 and "densty" in process.stderr


@pytest.mark.slow  # docs/extending/own_recipe.md, which tests/docs follows, does the same
def test_a_copied_and_edited_recipe_runs_with_a_copied_and_edited_config(
    run_tune, tmp_path, tiny_config, logged_metrics, final_weights
):
    run_tune("cp", "gmt_full_finetune", "my_recipe.py", cwd=tmp_path)
    run_tune("cp", CONFIG, "my_config.yaml", cwd=tmp_path)
    recipe = (tmp_path / "my_recipe.py").read_text()
    loop_line = "                        self._optimizer.step()\n"
    assert recipe.count(loop_line) == 1
    edited = recipe.replace(loop_line, loop_line + '                        print("my own line", flush=True)\n')
    (tmp_path / "my_recipe.py").write_text(edited)

    config = yaml.safe_load((tmp_path / "my_config.yaml").read_text())
    config.update(tiny_config(tmp_path / "out", max_steps_per_epoch=2))
    (tmp_path / "my_config.yaml").write_text(yaml.safe_dump(config))
    process = run_tune(
        "run", "my_recipe", "--config", "my_config.yaml", "gradient_mask.density=0.5", "epochs=1", cwd=tmp_path
    )
    assert process.stdout.count("my own line") == 2
    assert [round(step["mask/density"], 1) for step in logged_metrics(tmp_path / "out")] == [0.5, 0.5]
    assert final_weights(tmp_path / "out")


def test_runs_by_name_from_an_empty_folder_also_where_autoload_is_off(run_tune, tmp_path, tiny_config, logged_metrics):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            tiny_config(
                tmp_path / "out",
                max_steps_per_epoch=2,
                gradient_mask={"_component_": "gmt_tune.GradientMask", "density": 0.2},
            )
        )
    )
    run_tune("run", "gmt_full_finetune", "--config", "config.yaml", cwd=tmp_path)
    with_autoload = logged_metrics(tmp_path / "out")
    # The module that torchtune runs for a recipe name it does not know
    command = [
        sys.executable,
        "-m",
        "gmt_full_finetune",
        "--config",
        "config.yaml",
        f"output_dir={tmp_path / 'unregistered'}",
    ]
    subprocess.run(
        [
            *command,
            f"metric_logger.log_dir={tmp_path / 'unregistered' / 'logs'}",
            "checkpointer.output_dir=unregistered",
        ],
        cwd=tmp_path,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        check=True,
        capture_output=True,
    )
    assert [step["loss"] for step in logged_metrics(tmp_path / "unregistered")] == [
        step["loss"] for step in with_autoload
    ]


def _python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


def test_importing_torch_imports_neither_torchtune_nor_torchao():
    code = (
        "import sys, torch; print([m for m in ('torchtune', 'torchao', 'omegaconf', 'datasets') if m in sys.modules], "
        "any(type(f).__name__ == 'TorchtuneFinder' for f in sys.meta_path))"
    )
    assert _python(code).stdout.split() == ["[]", "True"]


def test_importing_torch_costs_next_to_nothing_more():
    """Counts what is imported, which does not depend on how busy the machine is."""
    code = "import sys, torch; print(len([m for m in sys.modules if m.split('.')[0] == 'gmt_tune']))"
    assert int(_python(code).stdout) <= 3
    assert _python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout.strip() == "0"


def test_a_failure_of_the_hook_does_not_reach_other_imports(tmp_path):
    """The finder answers for torchtune alone: modules of other names never meet it."""
    code = (
        "import sys, torch; f = next(f for f in sys.meta_path if type(f).__name__ == 'TorchtuneFinder'); "
        "print([f.find_spec(n) for n in ('json', 'torch.nn', 'torchtune', 'torchtuner.x')])"
    )
    assert _python(code).stdout.strip() == "[None, None, None, None]"
