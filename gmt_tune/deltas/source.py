"""The model that a delta is applied to, which has to be the one that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gmt_tune.deltas.file_format import Block, Delta, HashingWeights, Pair, Side, as_bits
from gmt_tune.errors import UserError


class Source:
    """A folder, or a file, with the weights of one of a delta's two models, sharded in any way.

    Args:
        path: of the model.
        delta: between the two.
        side: which of the two it has to be.

    Raises:
        UserError: if a tensor is missing, or has another shape or dtype.
    """

    def __init__(self, path: Path, delta: Delta, side: Side) -> None:
        self._weights, self._delta, self._side = HashingWeights(path), delta, side
        self.path = path
        for pair in delta.plan.pairs:
            name, info = pair.of(side), delta.info(side, pair)
            if name is None or info is None:
                continue
            found = self._weights.tensors.get(name)
            if found is None or not found.is_like(info):
                raise self.is_another(f"it has no {name} of {info.dtype} {list(info.shape)}")

    def is_another(self, why: str) -> UserError:
        """The error for a model that the delta was not made from."""
        kind = "the tuned model" if self._side == "tuned" else f"the base, {self._delta.base_name},"
        return UserError(f"{self.path} is not {kind} that {self._delta.path} was made from: {why}; name that folder")

    def blocks(self, pair: Pair) -> Iterator[tuple[np.ndarray, Block]]:
        """The bits of a pair's entries, which may be changed in place, and what changes in each block.

        Raises:
            UserError: at the end, if these were not the entries that the delta was made from.
        """
        name, dtype = pair.of(self._side), self._delta.dtype(pair)
        slices = self._weights.blocks(name)
        for block in self._delta.blocks(pair):
            yield as_bits(next(slices, None), dtype, block.numel), block
        next(slices, None)  # at whose end the digest is known
        if name is not None and self._weights.sha256[name] != self._delta.plan.folder(self._side).sha256[name]:
            raise self.is_another(f"{name} has other values")
