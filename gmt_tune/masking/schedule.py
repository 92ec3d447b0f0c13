"""When selections are made: which tensors are due at an optimizer step, and which draw of a random one is in force."""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Schedule(NamedTuple):
    """Each tensor is due at its first step and then every ``refresh_every`` steps, or at its first step alone (None).

    It depends on the step alone, so it can be asked before a backward pass. Tensors with different phases take turns:
    a tensor is also due at the steps s with (s + phase) % refresh_every = 0, or, with ``in_turns``, at these alone.
    """

    refresh_every: int | None = 1
    in_turns: bool = False

    def is_due(self, step: int, phase: int = 0) -> bool:
        """Whether a tensor gets a new selection at an optimizer step, counted from 0."""
        if self.refresh_every is None:
            return step == 0
        return (step == 0 and not self.in_turns) or (step + phase) % self.refresh_every == 0

    def draw(self, step: int, phase: int = 0) -> int:
        """How many selections of a tensor came before the one that is in force at a step, not counting the first."""
        return 0 if self.refresh_every is None else (step + phase) // self.refresh_every

    @property
    def keeps(self) -> bool:
        """Whether a selection is used in more than one step."""
        return self.refresh_every != 1


def spread_turns(sizes: Mapping[str, int], turns: int) -> dict[str, int]:
    """Phases with which tensors take turns, so that as few entries as possible are due at the same step.

    Args:
        sizes: entries of each tensor by its name. Those of one layer are due together: names that are the same up to
            the first number in them.
        turns: how many there are.

    Returns:
        For each name its phase in a :class:`Schedule` that refreshes every ``turns`` steps.
    """
    layers: dict[str, list[str]] = {}
    for name in sizes:
        numbered = re.match(r"(?:.*?\.)?\d+\.", name)
        layers.setdefault(numbered[0] if numbered else name, []).append(name)
    entries = {layer: sum(sizes[name] for name in names) for layer, names in layers.items()}
    loads = [0] * turns
    phases = {}
    for layer in sorted(layers, key=lambda layer: -entries[layer]):  # the largest first, each where least is due
        turn = loads.index(min(loads))
        loads[turn] += entries[layer]
        phases.update(dict.fromkeys(layers[layer], -turn % turns))
    return phases
