"""What a Trainer does not do without a word: train past the mask, or put a broken checkpoint in a good one's place."""

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from gmt_tune.integrations.transformers import GradientMaskCallback
from gmt_tune.masking import nonfinite as delayed


class Unfreeze(TrainerCallback):
    """Unfreezes a layer at an event, and gives it to the optimizer."""

    def __init__(self, name: str, event: str) -> None:
        self._name = name
        setattr(self, event, self._unfreeze)

    def _unfreeze(self, args, state, control, model=None, optimizer=None, **kwargs):
        p = dict(model.named_parameters())[self._name]
        if not p.requires_grad:
            p.requires_grad_(True)
            optimizer.param_groups[0]["params"].append(p)  # a new group is more than a schedule takes


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_layer_that_another_callback_unfreezes_is_masked_whatever_the_order(
    make_trainer, make_model, event, is_first
):
    model, name = make_model(), "model.layers.0.mlp.up_proj.weight"
    dict(model.named_parameters())[name].requires_grad_(False)
    callback, other = GradientMaskCallback(density=0.1), Unfreeze(name, event)
    trainer = make_trainer([other, callback] if is_first else [callback, other], model, max_steps=2)
    trainer.train()
    assert name in callback.mask.masked_parameters
    statistics = callback.mask.statistics
    assert int(statistics.selected[name]) == pytest.approx(0.1 * statistics.numel[name], abs=2)


class AddHead(TrainerCallback):
    """Puts a new parameter into the optimizer, which no mask knows."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 1:
            model.extra = torch.nn.Parameter(torch.ones(3))
            model.extra.grad = torch.ones(3)
            optimizer.add_param_group({"params": [model.extra]})


def test_a_parameter_that_another_callback_adds_ends_the_run(make_trainer):
    with pytest.raises(ValueError, match=r"does not know \(parameter 0 of group 2, shape \(3,\)\)"):
        make_trainer([GradientMaskCallback(density=0.2), AddHead()]).train()


def test_a_checkpoint_of_a_step_with_nan_does_not_replace_the_last_good_one(
    make_trainer, make_model, monkeypatch, tmp_path
):
    """With flags that are read late, as on a GPU: the step that met NaN still ends before it is saved."""

    def add_late(self, names, flags, where):
        if flags:
            self._pending.append((list(names), where, torch.stack(flags), lambda: None))

    monkeypatch.setattr(delayed.DelayedFlags, "add", add_late)
    model = make_model()
    calls = []

    def nan_in_step_2(grad):
        calls.append(1)
        return grad * float("nan") if len(calls) > 2 else grad  # two micro-batches a step

    model.lm_head.weight.register_hook(nan_in_step_2)
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_grad_norm": 0.0}
    with pytest.raises(RuntimeError, match="holds NaN or infinity at optimizer step 2"):
        make_trainer([GradientMaskCallback(density=0.2)], model, **settings).train()
    assert [path.name for path in Path(tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_resume_without_the_masks_file_says_why_it_is_not_there(make_trainer, tmp_path):
    def resume(**settings):
        callback = GradientMaskCallback(density=0.2, refresh_every=None)
        trainer = make_trainer([callback], save_strategy="steps", save_steps=2, max_steps=4, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))

    first = GradientMaskCallback(density=0.2, refresh_every=None)
    make_trainer([first], save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    with pytest.raises(FileNotFoundError, match="checkpoint-2 holds no .*save_only_model=True.*begin a new run"):
        resume(save_only_model=True)
    make_trainer([], save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(FileNotFoundError, match="checkpoint-2 holds no .*a run without GradientMaskCallback wrote it"):
        resume()
    make_trainer([first], save_strategy="steps", save_steps=2, max_steps=2).train()
    file = tmp_path / "out" / "checkpoint-2" / "gradient_mask.pt"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"gradient_mask\.pt is truncated or damaged .*an older checkpoint"):
        resume()
