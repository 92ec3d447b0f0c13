"""Where in a model a parameter sits, from its name, be it torchtune's or Hugging Face's."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LAYER = re.compile(r"(?:^|\.)(\d{1,9})\.")
_ENDINGS = (".weight", ".scale")

# The order in which a layer's modules are met on the way through it, for axes.
_ORDER = ("q_proj", "k_proj", "v_proj", "qkv", "o_proj", "output_proj", "gate", "w1", "up", "w3", "down", "w2", "norm")


def split_name(name: str) -> tuple[int | None, str]:
    """Layer and module of a parameter: ``model.layers.3.self_attn.q_proj.weight`` gives ``(3, "self_attn.q_proj")``.

    The first whole number in the dotted name (None if there is none), and what follows it without ``.weight``.
    """
    match = _LAYER.search(name)
    layer, module = (int(match[1]), name[match.end() :]) if match else (None, name)
    for ending in _ENDINGS:
        module = module.removesuffix(ending)
    return layer, module


@dataclass
class Grid:
    """Numbers per parameter, laid out by layer and module."""

    layers: list[int]  # in rising order
    modules: list[str]  # short names, in the order in which a layer uses them
    values: list[list[float]]  # one row per layer, one column per module; NaN where the layer has no such module
    outside: dict[str, float]  # of parameters that belong to no layer

    def cells(self) -> list[tuple[float, int, str]]:
        """Finite values with their layer and module."""
        return [
            (value, layer, module)
            for layer, row in zip(self.layers, self.values, strict=True)
            for module, value in zip(self.modules, row, strict=True)
            if math.isfinite(value)
        ]


def to_grid(numbers: Mapping[str, float]) -> Grid:
    cells: dict[tuple[int, str], float] = {}
    outside: dict[str, float] = {}
    for name, value in numbers.items():
        layer, module = split_name(name)
        if layer is None:
            outside[module] = value
        else:
            cells[layer, module] = value
    layers = sorted({layer for layer, _ in cells})
    modules = sorted({module for _, module in cells}, key=_position)
    values = [[cells.get((layer, module), math.nan) for module in modules] for layer in layers]
    short = [".".join(ending) for ending in distinct_endings([tuple(module.split(".")) for module in modules])]
    return Grid(layers, short, values, outside)


def distinct_endings(names: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Of names in parts, as many last parts as it takes to tell each from the others."""
    endings = []
    for name in names:
        lengths = range(1, len(name) + 1)
        length = next((n for n in lengths if len({other for other in names if other[-n:] == name[-n:]}) == 1), 0)
        endings.append(name[-length:])
    return endings


def _position(module: str) -> tuple[int, str]:
    return next((i for i, part in enumerate(_ORDER) if part in module), len(_ORDER)), module
