"""The recipes with CompactAdamW: losses, clipping, numbers that go wrong, several processes, refusals."""

import json
import math
from pathlib import Path

import pytest
import torch

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
