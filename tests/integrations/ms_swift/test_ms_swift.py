"""The example plugin for ms-swift, in the real one: what it selects, saves, and resumes."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("swift", reason="ms-swift is not installed: requirements.txt beside this file says how")


ROOT = Path(__file__).parents[3]


def test_the_page_shows_the_example():
    page = (ROOT / "docs" / "integrations.md").read_text()
    [block] = re.findall(rf"```python [^\n]* tested-by=\S*/{Path(__file__).name}\n(.*?)```", page, re.DOTALL)
    assert (ROOT / "examples" / "ms_swift_plugin.py").read_text().endswith("\n" + block)


@pytest.fixture
def run_here():
    """Function that runs ``swift sft`` or ``swift rlhf`` in this process, and gives its Trainer.

    It takes the options of the command, its name, and callbacks to add to the Trainer's.
    """
    from swift.callbacks import callbacks_map
    from swift.pipelines import rlhf_main, sft_main
    from transformers import TrainerCallback

    def run(options, pipeline="sft", *others):
        trainers = []
        for number, callback in enumerate(others):
            callbacks_map[f"other_{number}"] = lambda args, trainer, callback=callback: callback
        callbacks_map["note_trainer"] = lambda args, trainer: trainers.append(trainer) or TrainerCallback()
        where = options.index("--callbacks") + 2
        names = ["note_trainer", *(f"other_{number}" for number in range(len(others)))]
        {"sft": sft_main, "rlhf": rlhf_main}[pipeline](options[:where] + names + options[where:])
        return trainers[0]

    return run


@pytest.mark.parametrize("pipeline, kind", [("sft", {}), ("rlhf", {"rlhf_type": "dpo"})])
def test_a_step_moves_the_entries_that_a_full_sort_selects(
    swift_options, run_here, moves_only_selected, tmp_path, pipeline, kind
):
    from transformers import TrainerCallback

    # The example's policy has dense norms: here all is masked
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from swift.callbacks import callbacks_map\n"
        "from gmt_tune.integrations.transformers import GradientMaskCallback\n"
        "callbacks_map['all_masked'] = lambda args, trainer: GradientMaskCallback(density=0.2, dense=[])\n"
    )
    one_step = {"optim": "sgd", "learning_rate": 10.0, "max_steps": 1, "save_strategy": "no", "weight_decay": 0}
    options = swift_options(external_plugins=plugin, callbacks="all_masked", **one_step, **kind)

    class Run(TrainerCallback):
        """A ``swift`` command as a trainer, whose model it keeps to itself."""

        def __init__(self, watch):
            self.watch = watch

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.model = model

        def train(self):
            run_here(options, pipeline, self.watch, self)

    moves_only_selected(Run, density=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient_mask", "gradient_mask_compact"])
def test_the_plugin_logs_saves_and_resumes(swift_options, run_swift, tmp_path, same_bits, name):
    from safetensors.torch import load_file

    run_swift("sft", swift_options(callbacks=name))
    whole, half = (tmp_path / "out" / f"checkpoint-{step}" for step in (4, 2))
    log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    densities = [entry["mask/density"] for entry in log if "loss" in entry]
    assert len(densities) == 4
    assert (half / "gradient_mask.pt").is_file()
    run_swift("sft", swift_options(callbacks=name, output_dir=tmp_path / "resumed", resume_from_checkpoint=half))
    undisturbed, resumed = (
        load_file(tmp_path / run / "checkpoint-4" / "model.safetensors") for run in ("out", "resumed")
    )
    assert same_bits(undisturbed, resumed) == []

    state = torch.load(whole / "optimizer.pt", weights_only=True)["state"]
    states = sum(value.numel() for of_one in state.values() for value in of_one.values() if value.dim() > 0)
    weights = sum(weight.numel() for weight in undisturbed.values())
    if "compact" in name:
        assert 0.04 < densities[-1] < 0.06  # behind four of 20 turns, among which all layers of this model are
        assert 0.05 * 2 * weights < states < 0.07 * 3 * weights  # two moments and an age
    else:
        assert all(0.19 < density < 0.21 for density in densities)
        assert states >= 2 * weights


@pytest.mark.slow
def test_two_processes_mask_what_they_reduced(swift_options, run_swift, tmp_path):
    options = swift_options(gradient_accumulation_steps=1, ddp_backend="gloo")
    run_swift("sft", options, NPROC_PER_NODE="2")
    folder = tmp_path / "out" / "checkpoint-4"
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    densities = [entry["mask/density"] for entry in log if "loss" in entry]
    assert len(densities) == 4 and all(0.19 < density < 0.21 for density in densities)
    assert (folder / "rng_state_1.pth").is_file()  # there were two


def test_the_compact_plugin_makes_the_optimizer_and_clips_in_it(swift_options, run_here):
    from gmt_tune import CompactAdamW

    changes = {"callbacks": "gradient_mask_compact", "max_grad_norm": 0.5, "optim": "adamw_torch_4bit"}
    trainer = run_here(swift_options(**changes))
    optimizer = trainer.optimizer.optimizer
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert isinstance(optimizer, CompactAdamW) and optimizer.state_bits == 4
    assert len(logs) == 4 and logs[-1]["grad_norm"] == pytest.approx(optimizer.grad_norm.item(), abs=1e-6)


def test_preferences_and_adapters_are_masked(swift_options, run_here):
    from gmt_tune.integrations.transformers import GradientMaskCallback

    options = swift_options(callbacks="gradient_mask_compact", rlhf_type="dpo", tuner_type="lora")
    trainer = run_here([*options, "--target_modules", "q_proj", "v_proj"], "rlhf")
    [mask] = (c.mask for c in trainer.callback_handler.callbacks if isinstance(c, GradientMaskCallback))
    assert mask.step == 4
    assert mask.statistics.numel and all("lora_" in name for name in mask.statistics.numel)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"optimizer": "own"}, "compact=True, and the optimizer is SGD"),
        ({"optim": "adafactor"}, "compact=True has no counterpart of optim='adafactor'"),
        ({"fp16": True}, "fp16 scales gradients.*set bf16=True"),
    ],
)
def test_another_optimizer_than_the_compact_one_is_refused(swift_options, run_here, settings, sentence):
    from swift.optimizers import OptimizerCallback, optimizers_map

    class Own(OptimizerCallback):
        def create_optimizer(self, model=None):
            return torch.optim.SGD(self.trainer.model.parameters(), lr=0.1)

    optimizers_map["own"] = Own
    with pytest.raises(ValueError, match=sentence):
        run_here(swift_options(callbacks="gradient_mask_compact", **settings))
