"""When selections are made: which tensors are due at an optimizer step, and which draw of a random one is in force."""

from typing import NamedTuple


class Schedule(NamedTuple):
    """Each tensor is due at its first step and then every ``refresh_every`` steps, or at its first step alone (None).

    It depends on the step alone, so it can be asked before a backward pass. Tensors with different phases take turns:
    a tensor is also due at the steps s with (s + phase) % refresh_every = 0.
    """

    refresh_every: int | None = 1

    def is_due(self, step: int, phase: int = 0) -> bool:
        """Whether a tensor gets a new selection at an optimizer step, counted from 0."""
        return step == 0 or (self.refresh_every is not None and (step + phase) % self.refresh_every == 0)

    def draw(self, step: int, phase: int = 0) -> int:
        """How many selections of a tensor came before the one that is in force at a step, not counting the first."""
        return 0 if self.refresh_every is None else (step + phase) // self.refresh_every

    @property
    def keeps(self) -> bool:
        """Whether a selection is used in more than one step."""
        return self.refresh_every != 1
