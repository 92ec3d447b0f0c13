"""The mask in the Trainer's loop: the same weights as in a plain loop, once per step, on its optimizers."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import TrainerCallback

from gmt_tune import GradientMask
from gmt_tune.integrations.transformers import GradientMaskCallback

# An entry moves if and only if its gradient stayed
SGD = {"optim": "sgd", "weight_decay": 0.0, "learning_rate": 10.0}
POLICY = {"density": 0.2, "dense": ["*norm*"], "frozen": ["*embed_tokens*"]}


def train_plain_loop(model, rows, policy, steps=5, micro_batch=4, accumulate=2):
    """What the Trainer of ``make_trainer`` does, written out: the independent answer."""
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    others = [p for name, p in model.named_parameters() if "norm" in name]
    mask = GradientMask(model.named_parameters(), **policy)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2
    )
    mask.register(optimizer)
    model.train()
    batches = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    for step in range(steps):
        micro_batches = [
            {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
            for batch in batches[step * accumulate : (step + 1) * accumulate]
        ]
        targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        for batch in micro_batches:
            model(**batch, num_items_in_batch=targets).loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("policy", [POLICY, {"density": 0.1, "scope": "global", "refresh_every": 3}])
def test_five_trainer_steps_equal_five_of_a_plain_loop(make_model, make_trainer, rows, same_bits, family, policy):
    plain = make_model(family)
    train_plain_loop(plain, rows, policy)
    trainer = make_trainer([GradientMaskCallback(**policy)], make_model(family))
    trainer.train()
    assert same_bits(trainer.model.state_dict(), plain.state_dict()) == []
    assert same_bits(make_model(family).state_dict(), plain.state_dict()) != []


def test_density_1_equals_the_trainer_without_callback(make_trainer, same_bits):
    without, with_mask = make_trainer(), make_trainer([GradientMaskCallback(density=1.0)])
    without.train(), with_mask.train()
    assert same_bits(without.model.state_dict(), with_mask.model.state_dict()) == []
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (without, with_mask)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_a_step_moves_the_entries_that_a_full_sort_selects(make_trainer, moves_only_selected, changes):
    callback = GradientMaskCallback(density=0.1)
    moves_only_selected(lambda watch: make_trainer([callback, watch], max_steps=1, **SGD, **changes), density=0.1)
    assert callback.mask.step == 1


def test_the_mask_comes_after_what_other_callbacks_do_to_gradients(make_trainer, moves_only_selected):
    class ShrinksTheLargest(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for p in model.parameters():
                p.grad = torch.where(p.grad.abs() > p.grad.abs().median(), p.grad * 1e-3, p.grad)

    callbacks = [GradientMaskCallback(density=0.1), ShrinksTheLargest()]
    moves_only_selected(lambda watch: make_trainer([*callbacks, watch], max_steps=1, **SGD), density=0.1)


def test_a_second_training_starts_a_new_mask_and_leaves_no_hook_behind(make_trainer):
    callback = GradientMaskCallback(density=0.1)
    trainer = make_trainer([callback], max_steps=2)
    trainer.train()
    first = callback.mask
    trainer.train()
    assert callback.mask is not first
    assert first.step == callback.mask.step == 2
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_training_tried_again_after_an_error_is_masked_once_per_step(make_trainer):
    class FailsOnce(TrainerCallback):
        failed = False

        def on_step_end(self, args, state, control, **kwargs):
            if not self.failed:
                self.failed = True
                raise RuntimeError("a full disk, say")

    callback = GradientMaskCallback(density=0.1)
    trainer = make_trainer([callback, FailsOnce()], max_steps=3)
    with pytest.raises(RuntimeError, match="full disk"):
        trainer.train()
    trainer.train()
    assert callback.mask.step == 3


def test_a_subclass_with_its_own_score_drops_in(make_trainer):
    class LeastFirst(GradientMask):
        def compute_score(self, name, parameter, grad):
            return 1 / (1 + grad.abs())

    callback = GradientMaskCallback(density=0.1, mask_class=LeastFirst)
    make_trainer([callback], max_steps=1).train()
    assert type(callback.mask) is LeastFirst and 0 < callback.mask.statistics.density < 0.2


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "rmsprop"])
def test_torch_optimizers_are_masked(make_trainer, optim):
    callback = GradientMaskCallback(density=0.2)
    trainer = make_trainer([callback], optim=optim, max_steps=2)
    trainer.train()
    assert callback.mask.step == 2 and 0.15 < callback.mask.statistics.density < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_torchao_optimizers_are_masked(make_trainer, optim):
    callback = GradientMaskCallback(density=0.2)
    trainer = make_trainer([callback], optim=optim, max_steps=3)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert callback.mask.step == 3 and 0.15 < callback.mask.statistics.density < 0.25
    assert losses[-1] < losses[0]


def test_bitsandbytes_optimizers_are_masked(make_trainer):
    pytest.importorskip("bitsandbytes")
    callback = GradientMaskCallback(density=0.2)
    trainer = make_trainer([callback], optim="adamw_bnb_8bit", max_steps=2)
    trainer.train()
    assert callback.mask.step == 2 and 0.15 < callback.mask.statistics.density < 0.25


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_fp16_scaler_skips_is_not_masked(make_trainer, optim):
    """accelerate gives a scaler to fp16 on a GPU alone: here the Trainer gets it by hand."""
    callback = GradientMaskCallback(density=0.2)
    trainer = make_trainer([callback], optim=optim, max_steps=4)
    # The first scaled loss is infinite, which the scaler answers with a much smaller scale
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-6)
    trainer.train()
    assert trainer.state.global_step == 4
    assert callback.mask.step == 3
