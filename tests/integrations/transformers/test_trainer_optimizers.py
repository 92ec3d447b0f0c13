"""The mask on the Trainer's own optimizers: torch's, torchao's, those of bitsandbytes, and under the fp16 scaler."""

import pytest
import torch

from gmt_tune.integrations.transformers import GradientMaskCallback

# The optimizer's class, and that of its states
TORCHAO = {
    "adamw_torch_8bit": ("AdamW8bit", "OptimState8bit"),
    "adamw_torch_4bit": ("AdamW4bit", "OptimState4bit"),
}
# States are quantized for tensors of at least 4096 entries, in whole blocks of 256
QUANTIZABLE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "rmsprop"])
def test_torch_optimizers_are_masked(make_trainer, optim):
    callback = GradientMaskCallback(density=0.2)
    trainer = make_trainer([callback], optim=optim, max_steps=2)
    trainer.train()
    assert callback.mask.step == 2 and 0.15 < callback.mask.statistics.density < 0.25


@pytest.mark.parametrize("optim", TORCHAO)
def test_five_steps_with_torchaos_optimizers_equal_those_of_a_plain_loop(
    make_trainer, make_model, train_plain_loop, same_bits, optim
):
    """Not compiled, which on a CPU would take most of the time; the next test compiles."""
    import torchao.optim

    optimizer_class, state_class = TORCHAO[optim]
    plain, callback = make_model(**QUANTIZABLE), GradientMaskCallback(density=0.2)
    trainer = make_trainer([callback], make_model(**QUANTIZABLE), optim=optim)
    block_size = trainer.create_optimizer().block_size  # 4 bits: 256 in transformers 5, 128 before
    with torch.compiler.set_stance("force_eager"):
        optimizer = train_plain_loop(
            plain,
            {"density": 0.2},
            lambda groups: getattr(torchao.optim, optimizer_class)(groups, lr=1e-2, block_size=block_size),
        )
        trainer.train()
    assert same_bits(trainer.model.state_dict(), plain.state_dict()) == []
    assert callback.mask.step == 5 and 0.19 < callback.mask.statistics.density < 0.21
    assert state_class in {type(state["exp_avg"]).__name__ for state in optimizer.state.values()}


@pytest.mark.slow
@pytest.mark.parametrize("optim", TORCHAO)
def test_torchaos_compiled_optimizers_move_the_entries_that_a_full_sort_selects(
    make_trainer, make_model, moves_only_selected, optim
):
    """At its first step, Adam moves an entry if and only if its gradient stayed."""
    callback = GradientMaskCallback(density=0.2)
    settings = {"optim": optim, "weight_decay": 0.0, "max_steps": 1}
    moves_only_selected(
        lambda watch: make_trainer([callback, watch], make_model(**QUANTIZABLE), **settings), density=0.2
    )


def test_bitsandbytes_optimizers_are_masked(make_trainer):
    pytest.importorskip("bitsandbytes", reason="it is not installed: pip install bitsandbytes")
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
