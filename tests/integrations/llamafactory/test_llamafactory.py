"""The examples for LLaMA-Factory, in the real one: what they select, save, and resume."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("llamafactory", reason="llamafactory is not installed: requirements.txt beside this file says how")


ROOT = Path(__file__).parents[3]


def _blocks_of_the_page(language: str) -> list[str]:
    """The blocks of the documentation that say that they are tested here."""
    page = (ROOT / "docs" / "integrations.md").read_text()
    return re.findall(rf"```{language}\b[^\n]* tested-by=\S*/{Path(__file__).name}\n(.*?)```", page, re.DOTALL)


def test_the_page_shows_the_example():
    [block] = _blocks_of_the_page("python")
    assert (ROOT / "examples" / "llamafactory_train.py").read_text().endswith("\n" + block)


@pytest.mark.parametrize("stage, dataset", [("sft", "sums"), ("dpo", "pairs")])
def test_a_step_moves_the_entries_that_a_full_sort_selects(sft_config, moves_only_selected, stage, dataset):
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    from gmt_tune.integrations.transformers import GradientMaskCallback

    one_step = {"optim": "sgd", "learning_rate": 10.0, "max_steps": 1, "save_strategy": "no"}
    config = sft_config(stage=stage, dataset=dataset, **one_step)

    class Run(TrainerCallback):
        """``run_exp`` as a trainer, whose model it keeps to itself."""

        def __init__(self, watch):
            self.watch = watch

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.model = model

        def train(self):
            run_exp(config, callbacks=[GradientMaskCallback(density=0.2, dense=[]), self.watch, self])

    moves_only_selected(Run, density=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["llamafactory_train.py", "llamafactory_train_compact.py"])
def test_an_example_logs_saves_and_resumes(run_example, sft_config, tmp_path, same_bits, example):
    from safetensors.torch import load_file

    run_example(example, sft_config())
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    densities = [entry["mask/density"] for entry in log if "loss" in entry]
    assert len(densities) == 4
    half = tmp_path / "out" / "checkpoint-2"
    assert (half / "gradient_mask.pt").is_file()
    run_example(example, sft_config(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(half)))
    undisturbed, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "resumed"))
    assert same_bits(undisturbed, resumed) == []

    state = torch.load(tmp_path / "out" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    states = sum(value.numel() for of_one in state.values() for value in of_one.values() if value.dim() > 0)
    weights = sum(weight.numel() for weight in undisturbed.values())
    if "compact" in example:
        assert 0.04 < densities[-1] < 0.06  # behind four of 20 turns, among which all layers of this model are
        assert 0.05 * 2 * weights < states < 0.07 * 3 * weights  # two moments and an age
    else:
        assert all(0.19 < density < 0.21 for density in densities)
        assert states >= 2 * weights


@pytest.mark.slow
def test_two_processes_mask_what_they_reduced(run_example, sft_config, tmp_path):
    config = sft_config(gradient_accumulation_steps=1, ddp_backend="gloo")
    run_example("llamafactory_train.py", config, processes=2)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    densities = [entry["mask/density"] for entry in log if "loss" in entry]
    assert len(densities) == 4 and all(0.19 < density < 0.21 for density in densities)
    assert (tmp_path / "out" / "checkpoint-4" / "rng_state_1.pth").is_file()  # there were two
    output = run_example("llamafactory_train_compact.py", {**config, "output_dir": "other"}, processes=2, check=False)
    assert "CompactAdamW takes gradients before DDP reduces them over the 2 processes" in output


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"use_muon": True}, "compact=True, and the optimizer is Muon"),
        ({"optim": "adafactor"}, "compact=True has no counterpart of optim='adafactor'"),
    ],
)
def test_another_optimizer_than_the_compact_one_is_refused(sft_config, settings, sentence):
    from llamafactory.train.tuner import run_exp

    from gmt_tune.integrations.transformers import GradientMaskCallback

    with pytest.raises(ValueError, match=sentence):
        run_exp(sft_config(**settings), callbacks=[GradientMaskCallback(density=0.2, compact=True)])


def test_adapters_are_masked(sft_config):
    from llamafactory.train.tuner import run_exp

    from gmt_tune.integrations.transformers import GradientMaskCallback

    callback = GradientMaskCallback(density=0.2, compact=True)
    run_exp(sft_config(finetuning_type="lora", lora_target="q_proj,v_proj"), callbacks=[callback])
    assert callback.mask.step == 4
    assert callback.mask.statistics.numel and all("lora_" in name for name in callback.mask.statistics.numel)


def test_v1s_example_moves_a_fifth_of_each_tensor_in_its_first_step(run_example, v1_config, tmp_path):
    from safetensors.torch import load_file

    [block] = _blocks_of_the_page("yaml")
    config = v1_config({}, max_steps=1)
    config["optim_config"] = {**yaml.safe_load(block)["optim_config"], "lr": 3e-3}
    run_example("llamafactory_v1_train.py", config)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("untied", "out"))
    assert before.keys() == after.keys()
    for name in before:
        moved = (before[name] != after[name]).float().mean().item()
        if "norm" in name:
            assert moved == 1.0, name
        elif "embed_tokens" not in name:  # of which the tokens that do not occur have no gradient
            assert 0.19 < moved <= 0.2001, name


@pytest.mark.slow
def test_v1s_example_resumes_within_a_refresh_interval(run_example, v1_config, tmp_path, same_bits):
    from safetensors.torch import load_file

    mask = {"density": 0.2, "refresh_every": 3}
    run_example("llamafactory_v1_train.py", v1_config(mask))
    half = str(tmp_path / "out" / "checkpoint-2")
    resumed = {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": half}
    run_example("llamafactory_v1_train.py", v1_config(mask, **resumed))
    assert same_bits(*(load_file(tmp_path / name / "model.safetensors") for name in ("out", "resumed"))) == []
    output = run_example("llamafactory_v1_train.py", v1_config({**mask, "density": 0.3}, **resumed), check=False)
    assert "the gradient mask differs from the saved one: density is 0.3, was 0.2" in output


@pytest.mark.slow
def test_v1s_example_refuses_a_checkpoint_without_its_selection(run_example, v1_config, tmp_path):
    """As FSDP2's are: ``torch.distributed.checkpoint`` takes states and groups alone from an optimizer."""
    mask = {"density": 0.2, "refresh_every": 3}
    run_example("llamafactory_v1_train.py", v1_config(mask, max_steps=2))
    file = tmp_path / "out" / "checkpoint-2" / "optimizer" / "state_dict.pt"
    state = torch.load(file, weights_only=True)
    del state["gradient_mask"]
    torch.save(state, file)
    resumed = {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": str(file.parents[1])}
    output = run_example("llamafactory_v1_train.py", v1_config(mask, **resumed), check=False)
    assert "holds no selection of gradient_mask, as FSDP2's do not: with refresh_every: 3" in output
    run_example("llamafactory_v1_train.py", v1_config({"density": 0.2}, **resumed))
