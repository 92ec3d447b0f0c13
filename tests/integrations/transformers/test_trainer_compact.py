"""CompactAdamW in a Trainer: the weights of a plain loop, clipped by itself, and refused where it cannot work."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from gmt_tune import CompactAdamW, GradientMask
from gmt_tune.integrations.transformers import GradientMaskCallback

POLICY = {"density": 0.2, "refresh_every": 3, "dense": ["*norm*"]}
# At density 0.5, selections of at least 4096 entries, which are quantized
QUANTIZABLE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
RESUMED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"}


class Watch(TrainerCallback):
    """What a reporter in front of the mask's callback gets, and what others see of arguments and gradients."""

    def __init__(self):
        self.norms, self.max_norms, self.whole = [], set(), []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.norms += [logs["grad_norm"]] if "loss" in logs else []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.max_norms.add(args.max_grad_norm)
        self.whole.append({name for name, p in model.named_parameters() if p.grad is not None})


def compact(max_norm=0.5, **options):
    return lambda groups: CompactAdamW(groups, lr=1e-2, max_grad_norm=max_norm, **options)


def logged(trainer):
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


def approx(record):
    """transformers 4 logs four decimals of a loss."""
    return [(pytest.approx(loss, abs=1e-4), pytest.approx(norm, rel=1e-6)) for loss, norm in record]


@pytest.mark.parametrize("refresh_every", [1, 3, None])
def test_five_trainer_steps_equal_five_of_a_plain_loop(
    make_model, make_trainer, train_plain_loop, same_bits, refresh_every
):
    policy = {**POLICY, "refresh_every": refresh_every}
    plain, record, watch = make_model(), [], Watch()
    train_plain_loop(plain, policy, compact(), record=record)
    trainer = make_trainer([watch, GradientMaskCallback(**policy, compact=True)])
    trainer.train()
    assert same_bits(trainer.model.state_dict(), plain.state_dict()) == []
    assert logged(trainer) == approx(record)
    assert any(norm > 0.5 for _, norm in record)
    assert watch.norms == [norm for _, norm in logged(trainer)] and watch.max_norms == {0.5}


def test_only_dense_and_due_parameters_hold_whole_gradients(make_trainer):
    watch, callback = Watch(), GradientMaskCallback(**POLICY, compact=True, track_selection_every=1)
    trainer = make_trainer([watch, callback], max_steps=3)
    trainer.train()
    masked = callback.mask.masked_parameters.keys()
    due = [whole & masked for whole in watch.whole]
    assert sorted(name for names in due for name in names) == sorted(masked) and all(due)
    assert trainer.state.log_history[-2]["mask/coverage"] == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_without_clipping_the_norm_is_logged_all_the_same(make_model, make_trainer, train_plain_loop, same_bits, bf16):
    plain, record = make_model(), []
    if bf16:
        plain.forward = torch.autocast("cpu", torch.bfloat16)(plain.forward)
    train_plain_loop(plain, POLICY, compact(max_norm=float("inf")), steps=2, record=record)
    trainer = make_trainer([GradientMaskCallback(**POLICY, compact=True)], max_grad_norm=0.0, max_steps=2, bf16=bf16)
    trainer.train()
    assert same_bits(trainer.model.state_dict(), plain.state_dict()) == []
    assert logged(trainer) == approx(record)
    assert trainer.args.max_grad_norm == 0.0 and trainer.optimizer.optimizer.max_grad_norm is None


def test_an_optimizer_of_the_users_own_serves_as_well(make_model, make_trainer, same_bits):
    made = make_trainer([GradientMaskCallback(**POLICY, compact=True)], weight_decay=0.0)
    given = make_trainer([GradientMaskCallback(**POLICY)])
    given.optimizer = CompactAdamW(given.model.parameters(), lr=1e-2, weight_decay=0.0)
    made.train(), given.train()
    assert logged(made) == logged(given)
    assert same_bits(made.model.state_dict(), given.model.state_dict()) == []


def test_groups_betas_and_bits_are_those_of_the_training_arguments(make_trainer):
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.3, "max_steps": 1}
    trainer = make_trainer([GradientMaskCallback(**POLICY, compact=True)], optim="adamw_torch_8bit", **settings)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    decayed, others = optimizer.param_groups
    assert decayed["betas"] == (0.8, 0.95) and decayed["eps"] == 1e-6 and decayed["lr"] == 1e-2
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert {id(p) for p in others["params"]} == {id(p) for n, p in trainer.model.named_parameters() if "norm" in n}
    assert optimizer.state_bits == 8


@pytest.fixture
def interrupted(make_trainer, tmp_path):
    """Function that trains, and leaves a checkpoint as of a run that was killed behind step 4."""

    def train(callback, model=None, **settings):
        trainer = make_trainer([callback], model, **RESUMED, **settings)
        trainer.train()
        shutil.copytree(tmp_path / "out" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
        return trainer, {**RESUMED, **settings, "output_dir": str(tmp_path / "killed")}

    return train


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_resumed_equals_undisturbed(make_trainer, interrupted, same_bits, refresh_every):
    policy = {**POLICY, "refresh_every": refresh_every, "compact": True}
    undisturbed, settings = interrupted(GradientMaskCallback(**policy))
    resumed = make_trainer([GradientMaskCallback(**policy)], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(undisturbed)
    assert same_bits(resumed.model.state_dict(), undisturbed.model.state_dict()) == []


def test_8_bit_states_resume_too_in_a_process_that_never_made_any(
    make_model, make_trainer, interrupted, same_bits, tmp_path
):
    policy = {"density": 0.5, "refresh_every": 3, "compact": True, "state_bits": 8, "bf16_stochastic_round": True}
    undisturbed, settings = interrupted(GradientMaskCallback(**policy), make_model(**QUANTIZABLE).bfloat16())
    states = undisturbed.optimizer.optimizer.state.values()
    assert "OptimState8bit" in {type(state["exp_avg"]).__name__ for state in states}
    resumed = make_trainer([GradientMaskCallback(**policy)], make_model(**QUANTIZABLE).bfloat16(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(resumed.model.state_dict(), undisturbed.model.state_dict()) == []
    load = (
        "import sys, torch; from gmt_tune import CompactAdamW\n"
        "CompactAdamW([torch.nn.Parameter(torch.zeros(1))], state_bits=8); torch.load(sys.argv[1], weights_only=True)"
    )
    file = tmp_path / "killed" / "checkpoint-4" / "optimizer.pt"
    subprocess.run([sys.executable, "-c", load, file], check=True, timeout=120)


def test_a_checkpoint_that_does_not_suit_is_refused(make_trainer, interrupted):
    masked, compact_ = GradientMaskCallback(**POLICY), GradientMaskCallback(**POLICY, compact=True)
    _, settings = interrupted(compact_)
    folder = Path(settings["output_dir"]) / "checkpoint-4"
    (folder / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint-4 holds no optimizer.pt"):
        make_trainer([compact_], **settings).train(resume_from_checkpoint=True)
    (folder / "gradient_mask.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4 holds no gradient_mask\.pt"):
        make_trainer([GradientMaskCallback(density=0.2, compact=True)], **settings).train(resume_from_checkpoint=True)
    shutil.rmtree(folder.parent)
    _, settings = interrupted(masked)
    with pytest.raises(ValueError, match="saved with compact=False: resume with the same"):
        make_trainer([compact_], **settings).train(resume_from_checkpoint=True)


def test_a_training_tried_again_after_an_error_within_a_step_starts_clean(make_model, make_trainer, same_bits):
    class FailsOnce(TrainerCallback):
        failed = False

        def on_substep_end(self, args, state, control, **kwargs):
            if not self.failed:
                self.failed = True
                raise RuntimeError("out of memory, say")

    def train(*others):
        trainer = make_trainer([GradientMaskCallback(density=0.2, refresh_every=2, compact=True), *others])
        if others:
            with pytest.raises(RuntimeError, match="out of memory"):
                trainer.train()
        trainer.train()
        return trainer

    again = train(FailsOnce())
    assert same_bits(again.model.state_dict(), train().model.state_dict()) == [] and again.args.max_grad_norm == 0.5
    assert not any(p._post_accumulate_grad_hooks for p in again.model.parameters())


class Shrinks(GradientMask):
    def apply_(self, parts, selections, optimizer):
        raise AssertionError


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"compact": 1}, "compact must be True or False"),
        ({"state_bits": 8}, "state_bits and bf16_stochastic_round are those of CompactAdamW: add compact=True"),
        ({"compact": True, "state_bits": 7}, "state_bits must be one of 32, 8, 4, fp8"),
        ({"compact": True, "scope": "global"}, "scope 'global' does not work with CompactAdamW: use scope 'tensor'"),
        ({"compact": True, "mask_class": Shrinks}, "Shrinks overrides apply_"),
    ],
)
def test_a_wrong_argument_is_refused_where_it_is_written(wrong, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        GradientMaskCallback(density=0.2, **wrong)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"optim": "adafactor"}, "compact=True has no counterpart of optim='adafactor': choose one of adamw_torch, "),
        ({"optim_args": "block_size=128"}, "compact=True does not read optim_args='block_size=128'"),
    ],
)
def test_a_setting_without_counterpart_is_refused_when_the_trainer_is_made(make_trainer, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_trainer([GradientMaskCallback(density=0.2, compact=True)], **settings)


def test_what_cannot_work_is_refused_before_the_first_step(make_trainer, make_model, monkeypatch):
    late = make_trainer()
    late.add_callback(GradientMaskCallback(density=0.2, compact=True))
    with pytest.raises(ValueError, match=r"the optimizer is AdamW: .*pass the callback to the Trainer's"):
        late.train()
    changed = make_trainer([GradientMaskCallback(density=0.2, compact=True)])
    changed.args.learning_rate = 1e-3
    with pytest.raises(ValueError, match="learning_rate was 0.01 when the Trainer was made, and is 0.001 now"):
        changed.train()
    twice = make_trainer([GradientMaskCallback(density=0.2)])
    twice.optimizer = CompactAdamW(twice.model.parameters(), lr=1e-2, max_grad_norm=0.1)
    with pytest.raises(ValueError, match="max_grad_norm is 0.1 in the optimizer and 0.5 in the training arguments"):
        twice.train()
    scaled = make_trainer([GradientMaskCallback(density=0.2, compact=True)])
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="fp16 scales gradients.*set bf16=True"):
        scaled.train()
