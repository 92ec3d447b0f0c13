from __future__ import annotations

import pytest
import torch
from model_folders import LAYER, changed


@pytest.fixture(params=[torch.bfloat16])
def tensors(request) -> dict[str, torch.Tensor]:
    """Of a base model: more than a block, an odd number of entries, a scalar, none, equal norms."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (1100, 1000), LAYER.format(0): (33, 31), LAYER.format(1): (33, 31)}
    made = {name: torch.randn(shape, generator=generator).to(request.param) for name, shape in shapes.items()}
    made |= {"model.norm.weight": torch.ones(33), "model.layers.0.norm.weight": torch.ones(33)}
    made |= {"scale": torch.tensor(3.0), "nothing": torch.empty(0, 3)}
    made |= {"mask": torch.ones(7, dtype=torch.bool), "steps": torch.arange(5)}
    return made


@pytest.fixture
def tuned(tensors) -> dict[str, torch.Tensor]:
    """What it became: one layer as it was."""
    names = ("model.embed_tokens.weight", LAYER.format(0), "scale", "model.norm.weight", "model.layers.0.norm.weight")
    return {**tensors, **{name: changed(tensors[name], 0.05 if tensors[name].ndim == 2 else 1.0) for name in names}}
