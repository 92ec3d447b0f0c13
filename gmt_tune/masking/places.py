"""Where the selected entries of a tensor are, in as little memory as finds them fast: what compact states lie by."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from gmt_tune.masking.packing import pack_selection, unpack_selection

_SEGMENT = 1 << 16  # entries whose places 16 bits tell apart
_BLOCK = 1 << 22  # entries that are looked at together, whole segments: bounds the passing memory


class Places:
    """Selected entries of a tensor, in row-major order: 2 bytes each, or 1 bit for each entry, whichever is less.

    Args:
        bits: the selection at 1 bit per entry, as :func:`gmt_tune.masking.packing.pack_selection` packs it.
        numel: entries of the tensor, selected or not.

    Attributes:
        count: how many are selected. Making places waits for the device, to know it; using them does not.
    """

    def __init__(self, bits: Tensor, numel: int) -> None:
        self.numel = numel
        found, counts = [], []
        for start in range(0, numel, _BLOCK):
            block = _unpack(bits, start, min(start + _BLOCK, numel))
            found.append(block.nonzero().view(-1).bitwise_and_(_SEGMENT - 1).to(torch.int16))  # its lower 16 bits stay
            counts += [segment.sum() for segment in block.split(_SEGMENT)]
        self._counts = torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64, device=bits.device)
        self._ends = list(itertools.accumulate(block.numel() for block in found))  # of the blocks' entries
        self.count: int = self._ends[-1] if found else 0
        self._is_sparse = 2 * self.count < bits.numel()
        self._stored = torch.cat(found) if self._is_sparse and found else bits

    def bits(self) -> Tensor:
        """At 1 bit per entry, as they were given."""
        if not self._is_sparse:
            return self._stored
        mask = torch.zeros(self.numel, dtype=torch.bool, device=self._stored.device)
        for _, _, index in self.chunks():
            mask[index] = True
        return pack_selection(mask)

    def chunks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Block by block: its number, which of the selected entries lie in it, and their flat indices (int64)."""
        first = 0
        for number, last in enumerate(self._ends):
            if last > first:
                yield number, slice(first, last), self._index(number, first, last)
            first = last

    def _index(self, number: int, first: int, last: int) -> Tensor:
        start = number * _BLOCK
        if not self._is_sparse:
            block = _unpack(self._stored, start, min(start + _BLOCK, self.numel))
            if block.is_cuda:
                return torch.nonzero_static(block, size=last - first).view(-1) + start
            return block.nonzero().view(-1).add_(start)
        counts = self._counts[start // _SEGMENT : (start + _BLOCK) // _SEGMENT]
        starts = torch.arange(start, start + counts.numel() * _SEGMENT, _SEGMENT, device=counts.device)
        within = self._stored[first:last].long().bitwise_and_(_SEGMENT - 1)
        return within.add_(starts.repeat_interleave(counts, output_size=last - first))

    def gather(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """The selected entries of a tensor, 1-d; into the first entries of ``out`` if it is given."""
        flat = values.reshape(-1)
        out = flat.new_empty(self.count) if out is None else out
        for _, part, index in self.chunks():
            torch.index_select(flat, 0, index, out=out[part])
        return out

    def scatter_(self, values: Tensor, into: Tensor) -> None:
        """Overwrite the selected entries of a tensor with the first of ``values``."""
        flat = into.view(-1) if into.is_contiguous() else into.reshape(-1)
        for _, part, index in self.chunks():
            flat.index_copy_(0, index, values[part])
        if not into.is_contiguous():
            into.copy_(flat.view(into.shape))

    def carry(self, values: Tensor, before: Places, out: Tensor) -> None:
        """Move what belongs to entries from where they lay before to where they lie now.

        Args:
            values: of the entries selected before.
            before: their places in the same tensor.
            out: of those selected now; entries that were not selected before stay as they are.
        """
        old = before.chunks()
        old_number, old_part, old_index = next(old, _NO_MORE)
        for number, part, index in self.chunks():
            while old_number < number:
                old_number, old_part, old_index = next(old, _NO_MORE)
            if old_number == number:
                at = torch.searchsorted(old_index, index).clamp_(max=old_index.numel() - 1)
                out[part] = torch.where(old_index[at] == index, values[old_part][at], out[part])


_NO_MORE = (sys.maxsize, slice(0), torch.empty(0, dtype=torch.int64))


def _unpack(bits: Tensor, start: int, stop: int) -> Tensor:
    return unpack_selection(bits[start // 8 : (stop + 7) // 8], stop - start)
