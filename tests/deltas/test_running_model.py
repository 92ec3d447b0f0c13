"""A delta changes a model in memory into the tuned one and back, entry by entry, or leaves it as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import LAYER, changed, save_model

from gmt_tune.deltas import apply_delta_, make_delta
from gmt_tune.errors import UserError


def copied(tensors: dict) -> dict:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(found: dict, wanted: dict) -> None:
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def delta(tensors, tuned, tmp_path) -> Path:
    base, after = save_model(tmp_path / "base", tensors), save_model(tmp_path / "tuned", tuned)
    make_delta(base, after, tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


def test_a_model_becomes_the_tuned_one_and_the_base_again(delta, tensors, tuned):
    model = copied(tensors)
    places = {name: tensor.data_ptr() for name, tensor in model.items()}
    apply_delta_(model, delta)
    assert_equal(model, tuned)
    apply_delta_(model, delta, remove=True)
    assert_equal(model, tensors)
    assert {name: tensor.data_ptr() for name, tensor in model.items()} == places


def test_one_fine_tune_takes_the_place_of_another(delta, tensors, tuned, tmp_path):
    other = {**tensors, LAYER.format(1): changed(tensors[LAYER.format(1)], 0.3, seed=5)}
    make_delta(tmp_path / "base", save_model(tmp_path / "other", other), tmp_path / "o.safetensors")
    model = copied(tensors)
    apply_delta_(model, delta)
    apply_delta_(model, delta, remove=True)
    apply_delta_(model, tmp_path / "o.safetensors")
    assert_equal(model, other)


@pytest.mark.parametrize("remove", [False, True])
def test_a_model_that_is_not_the_one_stays_as_it_was(remove, delta, tensors, tuned):
    given = tensors if remove else tuned
    model = copied(given)
    with pytest.raises(UserError, match="does not have this delta" if remove else "or has this delta already"):
        apply_delta_(model, delta, remove=remove)
    assert_equal(model, given)


def test_what_does_not_fit_is_named_before_anything_changes(delta, tensors):
    for name, tensor, message in [
        ("scale", None, "the model has no scale"),
        (LAYER.format(0), tensors[LAYER.format(0)].double(), r"is float64 \[33, 31\] in the model and"),
        (LAYER.format(0), tensors[LAYER.format(0)].T.contiguous(), r"\[31, 33\] in the model"),
        (LAYER.format(0), tensors[LAYER.format(0)].T.contiguous().T, "sharded, quantized or not contiguous"),
    ]:
        model = copied(tensors)
        del model[name]
        if tensor is not None:
            model[name] = tensor
        with pytest.raises(UserError, match=message):
            apply_delta_(model, delta)
        assert_equal(model, {other: value for other, value in tensors.items() if other != name})


def test_a_delta_of_other_shapes_is_for_folders(tensors, tmp_path):
    longer = {**tensors, LAYER.format(0): torch.cat([tensors[LAYER.format(0)]] * 2)}
    base, after = save_model(tmp_path / "base", tensors), save_model(tmp_path / "tuned", longer)
    make_delta(base, after, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="gmt-tune apply"):
        apply_delta_(copied(tensors), tmp_path / "d.safetensors")
