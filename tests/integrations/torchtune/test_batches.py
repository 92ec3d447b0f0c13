"""What a batch may hold on its way to the device."""

import pytest
import torch

from gmt_tune.integrations.torchtune.run.data import to_device


def test_a_batch_keeps_its_shape_on_the_way_to_the_device():
    batch = {"tokens": torch.arange(6).view(2, 3), "extra": {"mask": torch.ones(2, 3, dtype=torch.bool)}}
    moved = to_device(batch, torch.device("meta"))
    assert moved["tokens"].is_meta and moved["extra"]["mask"].is_meta and batch["tokens"].is_cpu
    tokens, labels = to_device((batch["tokens"], batch["tokens"]), torch.device("meta"))
    assert tokens.is_meta and labels.is_meta
    assert to_device(batch, torch.device("cpu"))["tokens"] is batch["tokens"]


def test_what_is_no_tensor_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match="a batch holds tensors, got list_iterator: let collate_fn make tensors of it"):
        to_device({"tokens": iter([1])}, torch.device("cpu"))
