"""With adapters, the mask acts on the adapters' gradients alone."""

import peft

from gmt_tune.integrations.transformers import GradientMaskCallback


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def test_the_adapters_gradients_are_masked_and_the_model_stands_still(make_trainer, make_model, moves_only_selected):
    callback = GradientMaskCallback(density=0.3)
    model = lora(make_model())
    # B starts as zeros, so that A has no gradient at first: start where both have one
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    settings = {"optim": "sgd", "learning_rate": 10.0, "weight_decay": 0.0, "max_steps": 1}
    moves_only_selected(lambda watch: make_trainer([callback, watch], model, **settings), density=0.3)
    assert callback.mask.statistics.numel.keys() == {n for n, p in model.named_parameters() if "lora_" in n}


def test_patterns_choose_among_adapters(make_trainer, make_model):
    callback = GradientMaskCallback(density=0.3, dense=["*lora_B*"])
    model = lora(make_model())
    make_trainer([callback], model, max_steps=2).train()
    assert callback.mask.statistics.numel.keys() == {name for name, _ in model.named_parameters() if "lora_A" in name}
