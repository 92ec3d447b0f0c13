"""What the tests of several integrations share: a model, and what they ask of a trained one."""

import pytest
import torch


@pytest.fixture(scope="session")
def chat_model(tiny_world):
    """The tiny Llama's folder, with the tokenizer files that hosts with chat templates of their own need."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_world / "model" / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    ).save_pretrained(tiny_world / "model")
    return tiny_world / "model"


@pytest.fixture(scope="session")
def same_bits():
    """Function that says which tensors of two state dicts differ in any bit."""

    def differing(one, other):
        assert one.keys() == other.keys()
        return [name for name in one if not torch.equal(one[name], other[name])]

    return differing


@pytest.fixture(scope="session")
def moves_only_selected():
    """Function that trains one step of plain SGD and compares what moved with a full sort of the gradient.

    It takes a function that makes the trainer, given a callback to add as the last one, and the density.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
            self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def check(make, density: float) -> None:
        watch = Watch()
        trainer = make(watch)
        trainer.train()
        assert watch.grads
        for name, p in trainer.model.named_parameters():
            moved = p != watch.before[name]
            if name not in watch.grads:
                assert not moved.any(), name
                continue
            magnitude = watch.grads[name].abs()
            kth = magnitude.flatten().sort(descending=True).values[max(1, int(density * p.numel())) - 1]
            selected = (magnitude >= kth) & (magnitude > 0)
            assert not (moved & ~selected).any(), name
            # A very small update can be lost in the rounding of a weight
            assert moved.sum() >= 0.9 * selected.sum(), name

    return check
