"""What the workers of sharded trainings share: a model whose tensors do not divide evenly, and an interruption."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback


class StopsAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(11)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,  # odd, as the next: shards of unequal size
            intermediate_size=49,
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )
