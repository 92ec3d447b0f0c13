"""The recipes with CompactAdamW: losses, clipping, numbers that go wrong, several processes, refusals."""

import pytest
import torch
import yaml
from forked_run import BREAK_UNSELECTED, ForkedRun
from omegaconf import OmegaConf

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config import check
from gmt_tune.integrations.torchtune.config.check import check_config

COMPACT = {"_component_": "gmt_tune.CompactAdamW", "lr": 1e-3}
MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "refresh_every": 3, "dense": []}
# Micro-batches of different lengths, one of which each epoch leaves over
ACCUMULATED = dict(epochs=2, gradient_accumulation_steps=3, max_steps_per_epoch=None)


def test_at_density_1_losses_and_norms_are_those_of_adamw(
    tmp_path, tiny_config, run_recipe, logged_metrics, final_weights
):
    """With ``null`` all gradients but the first step's are taken in compactly, as each micro-batch leaves them."""
    common = dict(clip_grad_norm=0.7, **ACCUMULATED)
    adamw = {"_component_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.01}
    run_recipe(tiny_config(tmp_path / "dense", optimizer=adamw, **common))
    assert min(step["grad_norm"] for step in logged_metrics(tmp_path / "dense")) > 0.7  # so that each step is clipped
    for refresh_every in (1, None):
        folder = tmp_path / f"refresh {refresh_every}"
        mask = {**MASK, "density": 1.0, "refresh_every": refresh_every}
        run_recipe(tiny_config(folder, optimizer=COMPACT, gradient_mask=mask, **common))
        for key in ("loss", "lr", "grad_norm"):
            found, wanted = ([step[key] for step in logged_metrics(f)] for f in (folder, tmp_path / "dense"))
            assert len(wanted) == 10 and found == pytest.approx(wanted, rel=1e-4), key
        found, wanted = (final_weights(f, 1) for f in (folder, tmp_path / "dense"))
        assert found.keys() == wanted.keys() and len(wanted) > 5
        assert all((found[key] - wanted[key]).abs().max() < 1e-4 for key in wanted)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory, tiny_config, run_recipe):
    """Function that trains with CompactAdamW, in turns and clipped; gives the output folder."""

    def run(name: str, **changes):
        folder = tmp_path_factory.mktemp(name)
        common = dict(
            optimizer=COMPACT, gradient_mask={**MASK, "dense": ["*norm*"]}, clip_grad_norm=0.7, epochs=2,
            gradient_accumulation_steps=2, max_steps_per_epoch=3,
        )  # fmt: skip
        run_recipe(tiny_config(folder, **{**common, **changes}))
        return folder

    return run


@pytest.fixture(scope="module")
def plain(a_run):
    return a_run("plain")


def test_what_changes_memory_or_looks_on_changes_no_number(plain, a_run, tiny_config, logged_metrics, final_weights):
    held_out = tiny_config(plain)["dataset"]
    folder = a_run(
        "knobs", enable_activation_checkpointing=True, dataset_val=held_out, run_val_every_n_steps=2, write_report=True,
        track_selection_every_n_steps=1,
    )  # fmt: skip
    found, wanted = ([step for step in logged_metrics(f) if "loss" in step] for f in (folder, plain))
    assert len(wanted) == 6 and wanted[-1]["loss"] < wanted[0]["loss"] - 0.1
    for key in ("loss", "lr", "grad_norm", "mask/density", "mask/threshold_median"):
        assert [step[key] for step in found] == [step[key] for step in wanted], key
    weights, others = final_weights(folder, 1), final_weights(plain, 1)
    assert others and all(torch.equal(weights[key], others[key]) for key in others)
    ages = [step["mask/age"] for step in found]
    assert ages[0] == 1.0 and ages == sorted(ages) and 2 < ages[-1] < 5
    assert all(0 < step["mask/overlap"] <= 1 for step in found[1:]) and found[-1]["mask/coverage"] > 0.2
    assert [step["val_loss"] for step in logged_metrics(folder) if "val_loss" in step][-1] < wanted[0]["loss"]
    assert "Age" in (folder / "report.html").read_text()


def test_density_grows_as_layers_get_their_turn_and_then_is_exact(plain, logged_metrics):
    found = [step["mask/density"] for step in logged_metrics(plain)]
    assert found[0] < found[1] < found[2] and found[2:] == [found[2]] * 4
    assert 0.199 < found[2] <= 0.2  # of each tensor k = floor(0.2 n), and no ties


def test_packed_rows_in_bf16_with_8_bit_states(a_run, tmp_path, tiny_config, logged_metrics, run_recipe, final_weights):
    config = tiny_config(tmp_path)
    folder = a_run(
        "packed", optimizer={**COMPACT, "lr": 3e-3, "state_bits": 8, "bf16_stochastic_round": True},
        gradient_mask={**MASK, "density": 0.6}, dataset={**config["dataset"], "packed": True}, dtype="bf16",
        batch_size=1, clip_grad_norm="inf",
    )  # fmt: skip
    steps = logged_metrics(folder)
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert all(0 < step["grad_norm"] < 100 for step in steps)
    assert all(torch.isfinite(weight).all() for weight in final_weights(folder, 1).values())


@pytest.mark.slow  # compilation
def test_compiled_losses_are_those_of_a_run_that_is_not(a_run, tmp_path, tiny_config, logged_metrics):
    data = {**tiny_config(tmp_path)["dataset"], "packed": True}  # one shape, so that it compiles once
    folders = [a_run(f"compile_{value}", compile=value, dataset=data, batch_size=1) for value in (True, False)]
    found, wanted = ([step["loss"] for step in logged_metrics(folder)] for folder in folders)
    assert len(set(wanted)) == 6 and found == pytest.approx(wanted, abs=1e-4)


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
    (dict(optimizer_in_bwd=True), {}, "optimizer_in_bwd: True does not work with .*CompactAdamW.*: set optimizer_in"),
    (dict(gradient_mask=None), {}, "CompactAdamW updates what a gradient_mask selects, and there is none: add"),
    (dict(gradient_mask={**MASK, "scope": "global"}), {}, "gradient_mask: scope 'global' does not work with Compact"),
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
