"""The mask in the Trainer's loop: the same weights as in a plain loop, once per step."""

import pytest
import torch
from transformers import TrainerCallback

from gmt_tune import GradientMask
from gmt_tune.integrations.transformers import GradientMaskCallback

# An entry moves if and only if its gradient stayed
SGD = {"optim": "sgd", "weight_decay": 0.0, "learning_rate": 10.0}
POLICY = {"density": 0.2, "dense": ["*norm*"], "frozen": ["*embed_tokens*"]}


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("policy", [POLICY, {"density": 0.1, "scope": "global", "refresh_every": 3}])
def test_five_trainer_steps_equal_five_of_a_plain_loop(
    make_model, make_trainer, train_plain_loop, same_bits, family, policy
):
    plain = make_model(family)
    train_plain_loop(plain, policy)
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
    callback = GradientMaskCallback(density=0.1, dense=[])
    moves_only_selected(lambda watch: make_trainer([callback, watch], max_steps=1, **SGD, **changes), density=0.1)
    assert callback.mask.step == 1


def test_the_mask_comes_after_what_other_callbacks_do_to_gradients(make_trainer, moves_only_selected):
    class ShrinksTheLargest(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for p in model.parameters():
                p.grad = torch.where(p.grad.abs() > p.grad.abs().median(), p.grad * 1e-3, p.grad)

    callbacks = [GradientMaskCallback(density=0.1, dense=[]), ShrinksTheLargest()]
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
