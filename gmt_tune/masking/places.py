"""Where the selected entries of a tensor are, in as little memory as finds them fast: what compact states lie by."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gmt_tune.masking.packing import pack_selection, unpack_selection

SEGMENT = 1 << 16  # entries whose places 16 bits tell apart
RUN = 1 << 8  # entries whose bits are counted together
# Entries that are looked at together, whole segments: bounds the passing memory, and on the CPU stays in the cache
_BLOCK = {"cpu": 1 << 20, "other": 1 << 22}

Chunk = tuple[int, slice, Tensor]  # a block's number, which of the selected entries lie in it, and their flat indices


class Lookup(NamedTuple):
    """What finds selected entries from their numbers, on the device alone: 8 bytes a segment, and of bits 2 a run more.

    Attributes:
        stored: int16 [count], the lower 16 bits of each one's flat index; or uint8, 1 bit per entry in whole runs.
        starts: int64 [segments], how many entries are selected before each segment.
        ranks: of bits, int16 [segments * SEGMENT / RUN], how many are selected before each run in its segment.
    """

    stored: Tensor
    starts: Tensor
    ranks: Tensor | None


class Places:
    """Selected entries of a tensor, in row-major order: 2 bytes each, or 1 bit for each entry, whichever is less.

    Args:
        bits: the selection at 1 bit per entry, as :func:`gmt_tune.masking.packing.pack_selection` packs it.
        numel: entries of the tensor, selected or not.

    Attributes:
        count: how many are selected. Making places waits for the device, to know it; using them does not.
    """

    def __init__(self, bits: Tensor, numel: int) -> None:
        self.numel, self._block = numel, _BLOCK["cpu" if bits.is_cpu else "other"]
        found, counts = [], []
        for start in range(0, numel, self._block):
            stop = min(start + self._block, numel)
            index = _unpack(bits, start, stop).nonzero().view(-1)
            segments = torch.arange(0, stop - start + SEGMENT, SEGMENT, device=bits.device)
            counts.append(torch.searchsorted(index, segments).diff())
            found.append(index.to(torch.int16))  # its lower 16 bits stay
        self._counts = torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64, device=bits.device)
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

    def drop_(self, at: Tensor, index: Tensor) -> None:
        """Let entries be selected no more.

        Args:
            at: which of the selected entries, in order.
            index: their flat indices.
        """
        if self._is_sparse:
            stays = torch.ones(self.count, dtype=torch.bool, device=at.device).index_fill_(0, at, False)
            self._stored = self._stored[stays]
        else:  # each bit is set, so subtracting clears it; bytes wrap
            self._stored.index_add_(0, index >> 3, (256 - (1 << (index & 7))).to(torch.uint8))
        self._counts -= torch.bincount(index // SEGMENT, minlength=self._counts.numel())
        per_block = self._block // SEGMENT
        self._ends = torch.stack([part.sum() for part in self._counts.split(per_block)]).cumsum(0).tolist()
        self.count = self._ends[-1]
        self.__dict__.pop("lookup", None)

    @functools.cached_property
    def lookup(self) -> Lookup:
        """For kernels; made when it is first asked for, and kept."""
        starts = self._counts.cumsum(0) - self._counts
        if self._is_sparse:
            return Lookup(self._stored, starts, None)
        ranks = []
        for start in range(0, self.numel, self._block):
            block = _unpack(self._stored, start, min(start + self._block, self.numel))
            runs = torch.nn.functional.pad(block, (0, -block.numel() % SEGMENT)).view(-1, SEGMENT // RUN, RUN).sum(-1)
            ranks.append((runs.cumsum(-1) - runs).to(torch.int16).view(-1))
        short = -self._stored.numel() % (RUN // 8)  # padding by nothing would be a copy, too
        stored = torch.nn.functional.pad(self._stored, (0, short)) if short else self._stored
        return Lookup(stored, starts, torch.cat(ranks))

    @property
    def is_one_block(self) -> bool:
        """Whether ``chunks`` gives one at most."""
        return len(self._ends) <= 1

    def chunks(self) -> Iterator[Chunk]:
        """Block by block: its number, which of the selected entries lie in it, and their flat indices (int64)."""
        first = 0
        for number, last in enumerate(self._ends):
            if last > first:
                yield number, slice(first, last), self._index(number, first, last)
            first = last

    def _index(self, number: int, first: int, last: int) -> Tensor:
        start = number * self._block
        if not self._is_sparse:
            stop = min(start + self._block, self.numel)
            block = _unpack(self._stored, start, stop)
            if block.is_cpu:
                return block.nonzero().view(-1).add_(start)
            # Their number is known, so that nothing need wait for the device: what is not selected goes behind the end
            at = torch.where(block, block.cumsum(0) - 1, last - first)
            index = torch.empty(last - first + 1, dtype=torch.int64, device=block.device)
            return index.scatter_(0, at, torch.arange(start, stop, device=block.device))[:-1]
        within = self._stored[first:last].long().bitwise_and_(SEGMENT - 1)
        if self.numel <= SEGMENT:
            return within
        counts = self._counts[start // SEGMENT : (start + self._block) // SEGMENT]
        if within.is_cpu:  # a few additions in place are faster than an index of starts
            for i, segment in enumerate(within.split(counts.tolist())):
                segment.add_(start + i * SEGMENT)
            return within
        starts = torch.arange(start, start + counts.numel() * SEGMENT, SEGMENT, device=counts.device)
        return within.add_(starts.repeat_interleave(counts, output_size=last - first))

    def gather(self, values: Tensor, out: Tensor | None = None, chunks: Iterable[Chunk] | None = None) -> Tensor:
        """The selected entries of a tensor, 1-d; into the first entries of ``out`` if it is given.

        ``chunks`` are what :meth:`chunks` gave, where they are at hand.
        """
        flat = values.reshape(-1)
        out = flat.new_empty(self.count) if out is None else out
        for _, part, index in self.chunks() if chunks is None else chunks:
            torch.index_select(flat, 0, index, out=out[part])
        return out

    def scatter_(self, values: Tensor, into: Tensor, chunks: Iterable[Chunk] | None = None) -> None:
        """Overwrite the selected entries of a tensor with the first of ``values``."""
        flat = into.view(-1) if into.is_contiguous() else into.reshape(-1)
        for _, part, index in self.chunks() if chunks is None else chunks:
            flat.index_copy_(0, index, values[part])
        if not into.is_contiguous():
            into.copy_(flat.view(into.shape))

    def kept_from(self, before: Places) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Entries that were selected in the same tensor before and are now, block by block.

        Yields:
            The range of the entries selected before that lie in the block; which of these there were, of all, and
            which of the entries selected now they are: 1-d int64.
        """
        ranks = torch.empty(min(self._block, self.numel), dtype=torch.int32, device=self._stored.device)
        old = before.chunks()
        old_number, old_part, old_index = next(old, _NO_MORE)
        for number, part, index in self.chunks():
            while old_number < number:
                old_number, old_part, old_index = next(old, _NO_MORE)
            if old_number == number:
                start = number * self._block
                ranks.zero_()  # 0: not selected before
                ranks[old_index - start] = torch.arange(
                    1, old_index.numel() + 1, dtype=torch.int32, device=index.device
                )
                rank = ranks.index_select(0, index - start)
                kept = rank.nonzero().view(-1)
                old_at = rank.index_select(0, kept).long().add_(old_part.start - 1)
                yield old_part, old_at, kept.add_(part.start)


_NO_MORE = (sys.maxsize, slice(0), torch.empty(0, dtype=torch.int64))


def _unpack(bits: Tensor, start: int, stop: int) -> Tensor:
    return unpack_selection(bits[start // 8 : (stop + 7) // 8], stop - start)
