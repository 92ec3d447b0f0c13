"""The recipes with CompactAdamW: losses, clipping, numbers that go wrong, several processes, refusals."""

import importlib.util
import json

import launch
import pytest
import torch
import yaml
from forked_run import BREAK_UNSELECTED, ForkedRun
from omegaconf import OmegaConf

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config import check
from gmt_tune.integrations.torchtune.config.check import check_config
from gmt_tune.integrations.torchtune.plugin.registry import recipe_path

COMPACT = {"_component_": "gmt_tune.CompactAdamW", "lr": 1e-3}
MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "refresh_every": 3}
# Micro-batches of different lengths, one of which each epoch leaves over
ACCUMULATED = dict(epochs=2, gradient_accumulation_steps=3, max_steps_per_epoch=None)


@pytest.mark.parametrize("refresh_every", [1, None])
def test_at_density_1_losses_and_norms_are_those_of_adamw(
    refresh_every, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights
):
    """With ``null`` all gradients but the first step's are taken in compactly: also those that wait for next epoch."""
    common = dict(clip_grad_norm=0.7, **ACCUMULATED)
    adamw = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.01}
    run_recipe(tiny_config(tmp_path / "dense", optimizer=adamw, **common))
    mask = {**MASK, "density": 1.0, "refresh_every": refresh_every}
    run_recipe(tiny_config(tmp_path / "compact", optimizer=COMPACT, gradient_mask=mask, **common))
    for key in ("loss", "lr", "grad_norm"):
        found, wanted = ([step[key] for step in logged_metrics(tmp_path / name)] for name in ("compact", "dense"))
        assert len(wanted) == 10 and found == pytest.approx(wanted, rel=1e-4), key
    assert min(step["grad_norm"] for step in logged_metrics(tmp_path / "dense")) > 0.7  # so that each step is clipped
    found, wanted = (final_weights(tmp_path / name, 1) for name in ("compact", "dense"))
    assert found.keys() == wanted.keys() and len(wanted) > 5
    assert all((found[key] - wanted[key]).abs().max() < 1e-4 for key in wanted)


@pytest.mark.parametrize("on_nonfinite", ["error", "skip"])
def test_an_entry_that_is_not_finite_and_not_selected_is_met_by_all_ranks(
    on_nonfinite, tmp_path, tiny_config, logged_metrics
):
    name = "layers.1.mlp.w2.weight"
    config = tiny_config(
        tmp_path / "out", optimizer=COMPACT, gradient_mask={**MASK, "refresh_every": None}, on_nonfinite=on_nonfinite
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    run = ForkedRun(file, processes=2, environment={BREAK_UNSELECTED: f"1 3 {name} nan"})
    statuses, said = run.wait(120), run.log.read_text()
    assert said.count(f"the gradient of '{name}' holds NaN or infinity at step 3, rows [") == 1
    if on_nonfinite == "error":
        assert statuses == [1, 1] and "Traceback" not in said and "no weight was changed by it" in said
    else:
        assert statuses == [0, 0]
        assert [step["skipped_steps"] for step in logged_metrics(tmp_path / "out")] == [0, 0, 1, 1]


REFUSED = [
    (dict(optimizer_in_bwd=True), {}, "optimizer_in_bwd: True does not work with .*CompactAdamW.*optimizer_in_bwd: False"),
    (dict(gradient_mask=None), {}, "CompactAdamW updates what a gradient_mask selects, and there is none: add the section"),
    (dict(gradient_mask={**MASK, "scope": "global"}), {}, "gradient_mask: scope 'global' does not work with CompactAdamW"),
    (dict(clip_grad_norm=1.0), dict(max_grad_norm=0.5), "clip_grad_norm is 1.0 and optimizer.max_grad_norm is 0.5"),
    ({}, dict(state_bits=5), "optimizer .* cannot be made: state_bits must be one of 32, 8, 4, fp8, got 5"),
    ({}, dict(state_bit=8), r"optimizer.state_bit \(8\) is no key of gmt_tune.CompactAdamW: did you mean .*state_bits"),
    ({}, dict(max_grad_norm=0), "optimizer .* cannot be made: max_grad_norm must be a number above 0, or None, got 0"),
    (
        dict(gradient_mask={"_component_": "benchmarks.quality.half_mask.HalfMask"}),
        {},
        "gradient_mask: HalfMask overrides apply_, which changes whole gradients",
    ),
]


@pytest.mark.parametrize(("changes", "keys", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_it_cannot_do_is_refused_before_the_model_is_loaded(changes, keys, message, tmp_path, tiny_config):
    config = tiny_config(tmp_path, **{"optimizer": {**COMPACT, **keys}, "gradient_mask": MASK, **changes})
    with pytest.raises(UserError, match=message):
        check_config(OmegaConf.create(config))


@pytest.mark.parametrize("norm", [None, 1.0, "inf"])
def test_one_norm_or_two_equal_ones_are_accepted(norm, tmp_path, tiny_config):
    for changes, keys in ((dict(clip_grad_norm=norm), {}), (dict(clip_grad_norm=1), dict(max_grad_norm=1.0))):
        config = tiny_config(tmp_path, optimizer={**COMPACT, **keys}, gradient_mask=MASK, **changes)
        check_config(OmegaConf.create(config))


def test_offloading_to_the_cpu_is_refused_where_gradients_arrive_too_late(tmp_path, tiny_config, monkeypatch):
    config = tiny_config(tmp_path, optimizer=COMPACT, gradient_mask=MASK, fsdp_cpu_offload=True)
    monkeypatch.setattr(check.torch, "__version__", "2.13.0")
    check_config(OmegaConf.create(config))
    monkeypatch.setattr(check.torch, "__version__", "2.12.1")
    with pytest.raises(UserError, match="fsdp_cpu_offload: True does not work with .*set fsdp_cpu_offload: False, or"):
        check_config(OmegaConf.create(config))
