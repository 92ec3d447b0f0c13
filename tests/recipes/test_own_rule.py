"""examples/own_rule.py: a rule of one's own is killed, goes on, and ends as if nothing had happened."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config.check import check_config

EXAMPLES = Path(__file__).parents[2] / "examples"
TUNE = Path(sys.executable).parent / "tune"


def command(output_dir: Path, *changes: str) -> list[str]:
    rule = "gradient_mask._component_=own_rule.OftenFirst"
    short = ["epochs=1", "max_steps_per_epoch=20", "evaluation=null", "write_report=False", "save_every_n_steps=5"]
    return ["run", "gmt_full_finetune", "--config", "quickstart", rule, f"output_dir={output_dir}", *short, *changes]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    (file,) = (output_dir / "epoch_0").glob("*.safetensors")
    return load_file(file)


def test_a_schedule_of_ones_own_trains_within_backward(
    tmp_path, tiny_config, run_recipe, logged_metrics, final_weights, monkeypatch
):
    monkeypatch.syspath_prepend(EXAMPLES)
    weights = {}
    for rule in ("own_rule.OftenFirst", "gmt_tune.GradientMask"):
        mask = {"_component_": rule, "density": 0.2}
        run_recipe(tiny_config(tmp_path / rule, gradient_mask=mask, max_steps_per_epoch=5, optimizer_in_bwd=True))
        assert [0.15 < step["mask/density"] < 0.25 for step in logged_metrics(tmp_path / rule)] == [True] * 5
        weights[rule] = final_weights(tmp_path / rule)
    own, plain = weights.values()
    assert any(not torch.equal(own[name], plain[name]) for name in own)


def test_a_scope_of_ones_own_of_several_tensors_is_refused_within_backward(tmp_path, tiny_config, monkeypatch):
    (tmp_path / "scopes_of_mine.py").write_text(
        "from gmt_tune import GradientMask\n\n\n"
        "class ByKind(GradientMask):\n"
        "    def scope_of(self, name):\n"
        "        return name.split('.')[-2]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mask = {"_component_": "scopes_of_mine.ByKind", "density": 0.2}
    config = tiny_config(tmp_path / "out", gradient_mask=mask)
    check_config(OmegaConf.create(config))
    with pytest.raises(UserError, match=r"gradient_mask: scope '\w+' needs the gradients of all its tensors together"):
        check_config(OmegaConf.create({**config, "optimizer_in_bwd": True}))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["gmt_tune.CompactAdamW", "torch.optim.AdamW"])
def test_killed_and_resumed_it_ends_with_the_same_weights_and_another_rule_is_refused(tmp_path, run_tune, optimizer):
    changes = [f"optimizer._component_={optimizer}", "keep_last_n_checkpoints=null"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_tune(*command(straight, *changes), cwd=EXAMPLES)

    process = subprocess.Popen([TUNE, *command(killed, *changes)], cwd=EXAMPLES, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "step_10").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "step_10").is_dir() and not (killed / "epoch_0").exists(), "it was not killed in the middle"

    resume = [*changes, "resume_from_checkpoint=True"]
    for other, sentence in (
        ("gradient_mask.growth=3", "gradient_mask.growth is 3"),
        ("gradient_mask._component_=gmt_tune.GradientMask", "gradient_mask._component_ is 'gmt_tune.GradientMask'"),
    ):
        refused = run_tune(*command(killed, *resume, other), cwd=EXAMPLES, check=False)
        assert refused.returncode != 0 and sentence in refused.stdout + refused.stderr
    run_tune(*command(killed, *resume), cwd=EXAMPLES)
    wanted, found = weights(straight), weights(killed)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
