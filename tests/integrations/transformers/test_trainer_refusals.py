"""What cannot be masked, or is written wrongly, is refused with a sentence, as early as it can be seen."""

import subprocess
import sys
import types

import pytest
import torch
from transformers import TrainingArguments

from gmt_tune import GradientMask
from gmt_tune.integrations.transformers import GradientMaskCallback


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"density": 20}, "for 20 percent write 0.2"),
        ({"density": 0}, "density must be a number above 0"),
        ({"density": 0.2, "scope": "layer"}, "scope must be one of tensor, global"),
        ({"density": 0.2, "score": "magnitud"}, "score must be one of"),
        ({"density": 0.2, "refresh_every": 0}, "refresh_every must be a whole number"),
        ({"density": 0.2, "refesh_every": 4}, "did you mean 'refresh_every'"),
        ({"density": 0.2, "mask_class": dict}, "mask_class must be GradientMask or a subclass"),
    ],
)
def test_a_wrong_argument_is_refused_where_it_is_written(wrong, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        GradientMaskCallback(**wrong)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"dense": "*norm*"}, "dense must be a list of name patterns"),
        ({"frozen": ["*.embedding.*"]}, "frozen: the pattern '\\*.embedding.\\*' matches no parameter"),
        ({"dense": ["*"]}, "no parameter is left to mask"),
    ],
)
def test_a_wrong_pattern_is_refused_when_the_trainer_is_made(make_trainer, wrong, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        make_trainer([GradientMaskCallback(density=0.2, **wrong)])


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "lomo", "adalomo", "apollo_adamw_layerwise"])
def test_optimizers_that_step_in_backward_are_refused(make_trainer, optim):
    with pytest.raises(ValueError, match=f"optim='{optim}' updates weights during the backward pass"):
        make_trainer([GradientMaskCallback(density=0.2)], optim=optim)


def test_fsdp_version_1_is_refused_and_2_named(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config={"version": 1})
    with pytest.raises(ValueError, match="FSDP version 1 flattens .* set fsdp_config={'version': 2}"):
        GradientMaskCallback(density=0.2).on_init_end(args, None, None)


def test_two_masks_on_one_optimizer_are_refused(make_trainer):
    trainer = make_trainer([GradientMaskCallback(density=0.2)], max_steps=1)
    second = GradientMaskCallback(density=0.3)
    trainer.add_callback(second)
    with pytest.raises(ValueError, match="another gradient mask of the same parameters is registered on the AdamW"):
        trainer.train()
    trainer.remove_callback(second)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_mask_registered_by_hand_beside_the_callback_is_refused(make_trainer, make_model):
    model = make_model()
    trainer = make_trainer([GradientMaskCallback(density=0.2)], model)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradientMask(model.named_parameters(), density=0.2).register(trainer.optimizer)
    with pytest.raises(ValueError, match="another gradient mask of the same parameters is registered on the SGD"):
        trainer.train()


def test_one_callback_serves_one_trainer_after_another(make_trainer):
    callback = GradientMaskCallback(density=0.2)
    for steps in (1, 2):
        make_trainer([callback], max_steps=steps).train()
        assert callback.mask.step == steps


def test_an_optimizer_that_goes_past_its_hooks_stops_the_run(make_trainer, make_model):
    class Bypassing(torch.optim.SGD):
        pass

    model = make_model()
    optimizer = Bypassing(model.parameters(), lr=0.1)
    optimizer.step = types.MethodType(lambda self, closure=None: None, optimizer)
    trainer = make_trainer([GradientMaskCallback(density=0.2)], model)
    trainer.optimizer = optimizer
    with pytest.raises(RuntimeError, match="Bypassing changed weights without calling its step hooks"):
        trainer.train()


def test_frozen_parameters_get_no_optimizer_state_and_stand_still(make_trainer, make_model, same_bits):
    trainer = make_trainer([GradientMaskCallback(density=0.2, frozen=["*.embed_tokens.*", "lm_head*"])], max_steps=2)
    trainer.train()
    held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in trainer.model.parameters()) - 2 * 97 * 32
    moved = same_bits(make_model().state_dict(), trainer.model.state_dict())
    assert "model.embed_tokens.weight" not in moved and "lm_head.weight" not in moved and len(moved) > 10


def test_nonfinite_gradients_are_named_with_their_step(make_trainer, make_model):
    model = make_model()
    model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RuntimeError, match="NaN or infinity at optimizer step 1"):
        make_trainer([GradientMaskCallback(density=0.2)], model, max_grad_norm=0.0).train()


def test_no_import_brings_in_more_than_it_needs():
    check = (
        "import sys, gmt_tune\n"
        "heavy = {'transformers', 'trl', 'axolotl', 'accelerate', 'peft', 'torchtune'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import gmt_tune.integrations.transformers\n"
        "assert not {'trl', 'axolotl', 'torchtune'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
