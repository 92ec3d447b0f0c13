"""The recipe with LinearCrossEntropyLoss: the run of a chunked loss, to rounding."""

import pytest

CHUNKED = {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}
LINEAR = {"_component_": "gmt_tune.models.losses.LinearCrossEntropyLoss", "num_chunks": 3}


def test_losses_are_those_of_a_chunked_loss(tmp_path, tiny_config, run_recipe, logged_metrics):
    found = {}
    for name, loss in (("chunked", CHUNKED), ("linear", LINEAR)):
        config = tiny_config(
            tmp_path / name,
            loss=loss,
            gradient_accumulation_steps=2,
            max_steps_per_epoch=3,
            clip_grad_norm=1.0,
            enable_activation_checkpointing=True,
        )
        run_recipe(config | {"dataset_val": config["dataset"]})
        found[name] = logged_metrics(tmp_path / name)
    assert [step.keys() for step in found["linear"]] == [step.keys() for step in found["chunked"]]
    assert sum("val_loss" in step for step in found["linear"]) == 1 and len(found["linear"]) == 4
    for chunked, linear in zip(found["chunked"], found["linear"], strict=True):
        for key in {"loss", "grad_norm", "val_loss"} & chunked.keys():
            assert linear[key] == pytest.approx(chunked[key], rel=1e-5), key
