"""Runs that read a step's numbers behind the next step, as they do on a GPU, so that no step waits for the device."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from forked_run import BREAK, READ_LATE, STOP_AT, ForkedRun

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.run import step_numbers
from gmt_tune.integrations.torchtune.run.recipe_setup import RecipeSetup
from gmt_tune.integrations.torchtune.run.step_numbers import StepNumbers

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "refresh_every": 3, "dense": []}
NAME = "layers.1.mlp.w2.weight"


@pytest.fixture
def read_late(monkeypatch):
    begin = RecipeSetup.__init__

    def beginning(self, cfg):
        begin(self, cfg)
        self._reads_late = True

    monkeypatch.setattr(RecipeSetup, "__init__", beginning)


@pytest.fixture
def break_gradient(gmt_recipe, monkeypatch):
    """Function that puts NaN into one gradient right after the backward pass of one step."""

    def arrange(at_step: int) -> None:
        reduce = gmt_recipe._reduce

        def breaking(self, *args):
            if self.global_step + 1 == at_step:
                self._model.get_parameter(NAME).grad.view(-1)[3] = float("nan")
            return reduce(self, *args)

        monkeypatch.setattr(gmt_recipe, "_reduce", breaking)

    return arrange


def test_without_the_last_step_only_what_was_sent_before_it_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(step_numbers, "start_copy", lambda values: (values, lambda: waited.append(int(values[0]))))
    numbers = StepNumbers()
    for step in (1, 2, 3):
        numbers.send({"step": torch.tensor(step), "loss": torch.tensor(0.1, dtype=torch.bfloat16)}, origin=str(step))
        assert list(numbers.receive(with_last=False)) == (
            [] if step == 1 else [({"step": step - 1, "loss": 0.10009765625}, str(step - 1))]
        )
    assert waited == [1, 2]
    assert [(received["step"], origin) for received, origin in numbers.receive(with_last=True)] == [(3, "3")]
    assert list(numbers.receive(with_last=True)) == []


def test_a_count_of_tokens_stays_whole_beside_a_loss():
    numbers = StepNumbers()
    numbers.send({"loss": torch.tensor(0.1), "num_tokens": torch.tensor(2**24 + 1), "stops": torch.tensor(0)})
    ((received, _),) = numbers.receive(with_last=True)
    assert received == {"loss": torch.tensor(0.1).item(), "num_tokens": 2**24 + 1, "stops": 0}


@pytest.mark.parametrize("optimizer_in_bwd", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_numbers_and_weights_are_those_of_a_run_that_reads_at_once(
    optimizer_in_bwd, tmp_path, tiny_config, run_recipe, logged_metrics, final_weights, monkeypatch, request
):
    changes = dict(gradient_mask=MASK, max_steps_per_epoch=7, epochs=2, batch_size=2, optimizer_in_bwd=optimizer_in_bwd)
    run_recipe(tiny_config(tmp_path / "at_once", **changes))
    request.getfixturevalue("read_late")
    moments = []
    receive = StepNumbers.receive

    def noting(self, *, with_last):
        moments.append(with_last)
        return receive(self, with_last=with_last)

    monkeypatch.setattr(StepNumbers, "receive", noting)
    run_recipe(tiny_config(tmp_path / "late", log_every_n_steps=5, **changes))
    # Steps that are logged, or shown (an epoch's fifth), or end an epoch; and the end of the run
    assert moments == [step in (5, 7, 10, 12, 14) for step in range(1, 15)] + [True]
    wanted, late = (logged_metrics(tmp_path / name) for name in ("at_once", "late"))
    assert len(wanted) == 14 and len(late) == 2
    for step in (*late, *wanted):
        assert step.pop("tokens_per_second_per_gpu") > 0 and step.pop("mask/seconds") > 0
    assert late == wanted[4::5]
    weights, found = (final_weights(tmp_path / name, 1) for name in ("at_once", "late"))
    assert weights and all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("mask", [MASK, pytest.param(None, marks=pytest.mark.slow)], ids=["mask", "no mask"])
def test_what_is_not_finite_ends_the_run_a_step_later_and_nothing_is_written(
    mask, tmp_path, tiny_config, run_recipe, break_gradient, request
):
    break_gradient(at_step=2)
    changes = dict(gradient_mask=mask, log_every_n_steps=100, max_steps_per_epoch=8)
    with pytest.raises(UserError) as at_once:
        run_recipe(tiny_config(tmp_path / "at_once", **changes))
    request.getfixturevalue("read_late")
    with pytest.raises(UserError) as late:
        run_recipe(tiny_config(tmp_path / "late", **changes))
    before, behind = "no weight was changed by it", "weights have changed by it, and are not saved"
    assert f"the gradient of '{NAME}' holds NaN or infinity at step 2, rows [" in str(late.value)
    assert str(late.value) == str(at_once.value).replace(before, behind)
    assert before in str(at_once.value) and "on_nonfinite: skip" in str(late.value)
    assert not any(tmp_path.glob("late/*_*/model*")) and not (tmp_path / "late" / "logs" / "log.txt").read_text()


@pytest.mark.parametrize(
    "due",
    [
        "log_every_n_steps",
        pytest.param("save_every_n_steps", marks=pytest.mark.slow),
        pytest.param("run_val_every_n_steps", marks=pytest.mark.slow),
    ],
)
def test_where_something_is_due_behind_the_step_itself_it_is_not_done(
    due, tmp_path, tiny_config, run_recipe, gmt_recipe, break_gradient, read_late, monkeypatch
):
    break_gradient(at_step=2)
    done = []
    for name in ("_save", "_validate"):
        monkeypatch.setattr(gmt_recipe, name, lambda self, *args, name=name, **kwargs: done.append(name))
    monkeypatch.setattr(RecipeSetup, "_metric_logger", SimpleNamespace(log_dict=done.append, close=lambda: None))
    changes = {"gradient_mask": MASK, "log_every_n_steps": 100, due: 2}
    config = tiny_config(tmp_path, **changes)
    config["dataset_val"] = config["dataset"]
    with pytest.raises(UserError, match="at step 2, rows"):
        run_recipe(config)
    assert done == []


@pytest.mark.slow
def test_without_a_token_in_the_loss_the_run_ends_with_the_same_sentence(
    tmp_path, tiny_config, run_recipe, gmt_recipe, read_late, monkeypatch
):
    reduce = gmt_recipe._reduce

    def reduce_nothing(self, num_tokens, running):
        return reduce(self, *(2 * [torch.zeros_like(num_tokens)] if self.global_step == 1 else [num_tokens, running]))

    monkeypatch.setattr(gmt_recipe, "_reduce", reduce_nothing)
    with pytest.raises(UserError, match=r"^no token of step 2 is in the loss, rows \[.*raise it, or delete these rows"):
        run_recipe(tiny_config(tmp_path, gradient_mask=MASK, log_every_n_steps=100))


@pytest.mark.slow
def test_steps_are_left_out_before_weights_change_where_that_is_asked_for(
    tmp_path, tiny_config, run_recipe, break_gradient, logged_metrics, read_late
):
    break_gradient(at_step=2)
    recipe = run_recipe(tiny_config(tmp_path, gradient_mask=MASK, on_nonfinite="skip"))
    assert [step["skipped_steps"] for step in logged_metrics(tmp_path)] == [0, 1, 1, 1]
    assert all(torch.isfinite(p).all() for p in recipe._model.parameters())


def run_of(folder, config: dict, *overrides, processes: int = 2, **environment) -> ForkedRun:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return ForkedRun(file, *overrides, processes=processes, environment={READ_LATE: "1", **environment})


def test_a_rank_that_is_asked_to_stop_stops_all_together_a_step_later(tmp_path, tiny_config):
    config = tiny_config(tmp_path / "out", gradient_mask=MASK, log_every_n_steps=100, max_steps_per_epoch=None)
    run = run_of(tmp_path, config, **{STOP_AT: "1 3"})
    assert run.wait(120) == [128 + 15] * 2
    said = run.log.read_text()
    assert f"Stopped after step 4 and saved {tmp_path / 'out' / 'step_4'}" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_run_that_was_stopped_a_step_later_goes_on_exactly(tmp_path, tiny_config, final_weights):
    changes = dict(gradient_mask=MASK, log_every_n_steps=100, max_steps_per_epoch=None)
    run = run_of(tmp_path, tiny_config(tmp_path / "out", **changes), **{STOP_AT: "1 3"})
    assert run.wait(120) == [128 + 15] * 2
    more = run_of(tmp_path, tiny_config(tmp_path / "out", **changes), "resume_from_checkpoint=True")
    assert more.wait(120) == [0, 0]
    straight = run_of(tmp_path / "straight", tiny_config(tmp_path / "straight" / "out", **changes))
    assert straight.wait(120) == [0, 0]
    wanted, found = final_weights(tmp_path / "straight" / "out"), final_weights(tmp_path / "out")
    assert wanted and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.slow
def test_a_stop_that_is_asked_for_in_the_last_step_ends_the_run_as_usual(tmp_path, tiny_config):
    changes = dict(gradient_mask=MASK, log_every_n_steps=100, max_steps_per_epoch=3)
    run = run_of(tmp_path, tiny_config(tmp_path / "out", **changes), **{STOP_AT: "1 3"})
    assert run.wait(120) == [0, 0]
    assert json.loads((tmp_path / "out" / "epoch_0" / "training_progress.json").read_text())["progress"]["is_final"]


def test_a_gradient_that_is_not_finite_on_one_rank_ends_all_a_step_later(tmp_path, tiny_config):
    config = tiny_config(tmp_path / "out", gradient_mask=MASK, log_every_n_steps=100, save_every_n_steps=2)
    run = run_of(tmp_path, {**config, "max_steps_per_epoch": 6}, **{BREAK: f"1 3 {NAME} nan"})
    assert run.wait(120) == [1, 1]
    said = run.log.read_text()
    where = f"the gradient of '{NAME}' holds NaN or infinity at step 3, rows ["
    assert said.count(where) == 1 and "Traceback" not in said
    rows = json.loads("[" + said.partition(where)[2].partition("]")[0] + "]")
    assert len(set(rows)) == 2 * config["batch_size"]
    assert "are not saved. Lower the learning rate" in said and f"checkpoint: {tmp_path / 'out' / 'step_2'}" in said
    assert not (tmp_path / "out" / "step_4").exists()
