"""Where the selected entries of a tensor are, in as little memory as finds them fast: what compact states lie by."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from gmt_tune.masking import native
from gmt_tune.masking.bits import magnitude_bits
from gmt_tune.masking.nonfinite import FLAGS, nonfinite_flags
from gmt_tune.masking.packing import pack_selection, unpack_selection

SEGMENT = 1 << 16  # entries whose places 16 bits tell apart
RUN = 1 << 8  # entries whose bits are counted together
# Entries that are looked at together, whole segments: bounds the passing memory, and on the CPU stays in the cache
_BLOCK = {"cpu": 1 << 20, "other": 1 << 22}


class Lookup(NamedTuple):
    """What finds selected entries from their numbers, on the device alone. Where bits are kept, it costs 2 bytes a run.

    Attributes:
        stored: int16 [count], the lower 16 bits of each one's flat index; or uint8, 1 bit per entry in whole runs.
        starts: int64 [segments + 1], how many entries are selected before each segment, and in all.
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
        segments = -(-numel // SEGMENT)
        self._stored, self._is_sparse = bits, False
        library = self._library()
        if library is not None:
            counts = torch.zeros(segments, dtype=torch.int64, device="cpu")
            self._set_counts(counts)
            library.count_bits(byref(self.native()), native.pointer(counts), torch.get_num_threads())
            self._set_counts(counts)
        else:
            found, all_counts = [], [torch.zeros(0, dtype=torch.int64, device=bits.device)]
            for start in range(0, numel, self._block):
                stop = min(start + self._block, numel)
                index = _unpack(bits, start, stop).nonzero().view(-1)
                bounds = torch.arange(0, stop - start + SEGMENT, SEGMENT, device=bits.device)
                all_counts.append(torch.searchsorted(index, bounds).diff())
                found.append(index.to(torch.int16))  # its lower 16 bits stay
            self._set_counts(torch.cat(all_counts))
        if 2 * self.count < bits.numel():
            if library is None:
                offsets = torch.cat(found)
            else:
                offsets = torch.empty(self.count, dtype=torch.int16, device="cpu")
                library.offsets_of_bits(byref(self.native()), native.pointer(offsets), torch.get_num_threads())
            self._stored, self._is_sparse = offsets, True

    @classmethod
    def of_largest(cls, values: Tensor, smallest: int, most: int) -> Places | None:
        """The entries whose magnitude has at least these bits; of those that have just these, the first ones.

        Args:
            values: of the tensor.
            smallest: bits of the magnitude.
            most: how many entries to select; those of a larger magnitude are fewer.

        Returns:
            None where C++ does not serve these values.
        """
        if (library := native.load_for(values)) is None:
            return None
        places = cls.__new__(cls)
        places.numel, places._block = values.numel(), _BLOCK["cpu"]
        counts, ties = torch.empty(2, -(-places.numel // SEGMENT), dtype=torch.int64, device="cpu")
        given, threads = (*native.entries(values), smallest), torch.get_num_threads()
        library.count_largest_entries(
            *given, ctypes.c_int64(most), native.pointer(counts), native.pointer(ties), threads
        )
        places._set_counts(counts)
        n_bytes = -(-places.numel // 8)
        places._is_sparse = 2 * places.count < n_bytes
        size, dtype = (places.count, torch.int16) if places._is_sparse else (n_bytes, torch.uint8)
        places._stored = torch.empty(size, dtype=dtype, device="cpu")
        stored = native.pointer(places._stored)
        offsets, bits = (stored, None) if places._is_sparse else (None, stored)
        starts = native.pointer(places._starts)
        library.place_largest_entries(*given, starts, native.pointer(ties), offsets, bits, threads)
        return places

    @classmethod
    def of_lookup(cls, lookup: Lookup, count: int, numel: int) -> Places:
        """What kernels have found, of so many selected ones among all entries. Does not wait for the device."""
        places = cls.__new__(cls)
        places.numel, places._block, places.count = numel, _BLOCK["other"], count
        places._is_sparse, places._starts, places.lookup = lookup.ranks is None, lookup.starts, lookup
        places._stored = lookup.stored if places._is_sparse else lookup.stored[: -(-numel // 8)]
        return places

    def _set_counts(self, counts: Tensor) -> None:
        """Take in how many entries of each segment are selected."""
        self._starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        for name in ("lookup", "_ends"):
            self.__dict__.pop(name, None)
        self.count: int = self._ends[-1] if self._ends else 0

    @functools.cached_property
    def _ends(self) -> list[int]:
        """How many are selected before the end of each block; waits for the device when it is first asked for."""
        per_block = self._block // SEGMENT
        return [*self._starts[per_block:-1:per_block].tolist(), int(self._starts[-1])] if self.numel else []

    @functools.cached_property
    def lookup(self) -> Lookup:
        """For kernels; made when it is first asked for, and kept."""
        if self._is_sparse:
            return Lookup(self._stored, self._starts, None)
        ranks = []
        for start in range(0, self.numel, self._block):
            block = _unpack(self._stored, start, min(start + self._block, self.numel))
            runs = torch.nn.functional.pad(block, (0, -block.numel() % SEGMENT)).view(-1, SEGMENT // RUN, RUN).sum(-1)
            ranks.append((runs.cumsum(-1) - runs).to(torch.int16).view(-1))
        short = -self._stored.numel() % (RUN // 8)  # padding by nothing would be a copy, too
        stored = torch.nn.functional.pad(self._stored, (0, short)) if short else self._stored
        return Lookup(stored, self._starts, torch.cat(ranks))

    def native(self) -> NativePlaces:
        """What C++ is given of places on the CPU; as long as they are neither changed nor gone."""
        stored, starts = self._stored.data_ptr(), self._starts.data_ptr()
        offsets, bits = (stored, None) if self._is_sparse else (None, stored)
        return NativePlaces(offsets, bits, starts, self._starts.numel() - 1, self.numel)

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
        counts = self._starts.diff()
        self._set_counts(counts.sub_(torch.bincount(index // SEGMENT, minlength=counts.numel())))

    def chunks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Block by block: its number, which of the selected entries lie in it, and their flat indices (int64)."""
        for number, part in enumerate(self._blocks()):
            if part.stop > part.start:
                yield number, part, self._index(number, part.start, part.stop)

    def _blocks(self) -> list[slice]:
        """Which of the selected entries lie in each block."""
        return [slice(*ends) for ends in itertools.pairwise([0, *self._ends])]

    def _index(self, number: int, first: int, last: int) -> Tensor:
        start = number * self._block
        if (library := self._library()) is not None:
            index = torch.empty(last - first, dtype=torch.int64, device="cpu")
            numbers = ctypes.c_int64(first), ctypes.c_int64(last - first)
            library.indices(byref(self.native()), *numbers, native.pointer(index), torch.get_num_threads())
            return index
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
        counts = self._starts[start // SEGMENT : (start + self._block) // SEGMENT + 1].diff()
        starts = torch.arange(start, start + counts.numel() * SEGMENT, SEGMENT, device=counts.device)
        return within.add_(starts.repeat_interleave(counts, output_size=last - first))

    def gather(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """The selected entries of a tensor, 1-d; into the first entries of ``out`` if it is given."""
        out = values.new_empty(self.count) if out is None else out
        if self._gather_natively(values, out) is None:
            flat = values.reshape(-1)
            for _, part, index in self.chunks():
                torch.index_select(flat, 0, index, out=out[part])
        return out

    def gather_checked(self, values: Tensor, out: Tensor, *, adds: bool) -> Tensor:
        """The selected entries of a tensor into the first entries of ``out``, or added to them.

        Returns:
            Whether an entry of the tensor, selected or not, is NaN or infinity: 0-d bool. Does not wait for the device.
        """
        if (found := self._gather_natively(values, out, adds=adds, checks=True)) is not None:
            return FLAGS[found]
        (flag,) = nonfinite_flags([values])
        if adds:
            out[: self.count] += self.gather(values)
        else:
            self.gather(values, out)
        return flag

    def _gather_natively(self, values: Tensor, out: Tensor, *, adds: bool = False, checks: bool = False) -> bool | None:
        """What C++ found; None where it does not serve."""
        library = native.load_for(values, out) if native.serves(self._stored) else None
        if library is None:
            return None
        given = byref(self.native()), native.pointer(values), native.pointer(out), values.element_size()
        return bool(library.gather_entries(*given, adds, checks, torch.get_num_threads()))

    def find(self, values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Selected entries with a value of this magnitude.

        Args:
            values: of the selected entries, as :meth:`gather` gives them.
            bits: of the magnitude, 0-d.

        Returns:
            Which of the selected entries they are, and their flat indices: 1-d int64, in order.
        """
        at = (magnitude_bits(values) == bits).nonzero().view(-1)
        index = torch.empty_like(at)
        for _, part, indices in self.chunks():
            inside = slice(*torch.searchsorted(at, torch.tensor([part.start, part.stop], device=at.device)).tolist())
            index[inside] = indices.index_select(0, at[inside] - part.start)
        return at, index

    def scatter_(self, values: Tensor, into: Tensor) -> None:
        """Overwrite the selected entries of a tensor with the first of ``values``."""
        flat = into.view(-1) if into.is_contiguous() else into.reshape(-1)
        for _, part, index in self.chunks():
            flat.index_copy_(0, index, values[part])
        if not into.is_contiguous():
            into.copy_(flat.view(into.shape))

    def ranks_in(self, before: Places) -> Iterator[tuple[slice, slice, Tensor]]:
        """The numbers of selected entries in another selection of the same tensor, block by block.

        Yields:
            Which of the selected entries lie in the block, which of those selected before; and for each of the former
            its number among the latter, of all, or -1: 1-d int32. Blocks in which either has none are left out.
        """
        blocks = zip(self._blocks(), before._blocks(), strict=True)
        filled = [(i, *both) for i, both in enumerate(blocks) if all(part.stop > part.start for part in both)]
        if (library := self._library()) is not None:
            ranks = torch.empty(self.count, dtype=torch.int32, device="cpu")
            places = (byref(each.native()) for each in (self, before))
            library.ranks_in(*places, native.pointer(ranks), torch.get_num_threads())
            yield from ((part, old, ranks[part]) for _, part, old in filled)
            return
        ranks = torch.empty(min(self._block, self.numel), dtype=torch.int32, device=self._stored.device)
        for number, part, old in filled:
            start = number * self._block
            ranks.fill_(-1)
            numbers = torch.arange(old.start, old.stop, dtype=torch.int32, device=ranks.device)
            ranks[before._index(number, old.start, old.stop) - start] = numbers
            yield part, old, ranks.index_select(0, self._index(number, part.start, part.stop) - start)

    def _library(self) -> ctypes.CDLL | None:
        """What serves these places, where they are on the CPU."""
        return native.load(native.ENTRIES) if native.serves(self._stored) else None


def take_ranked(values: Tensor, ranks: Tensor, first: int, out: Tensor) -> None:
    """Values by their numbers, as :meth:`Places.ranks_in` gives them, into ``out``; zero where there is none.

    Args:
        values: 1-d, of 2 or 4 bytes each; those from number ``first`` on.
        ranks: int32.
        out: of the dtype of the values and the size of the ranks.
    """
    library = native.load(native.ENTRIES) if native.serves(values, ranks, out) else None
    if library is not None:
        n, size, threads = ctypes.c_int64(ranks.numel()), values.element_size(), torch.get_num_threads()
        pointers = native.pointer(values), native.pointer(ranks)
        library.take_ranked_entries(*pointers, n, first, native.pointer(out), size, threads)
    else:
        torch.index_select(values, 0, (ranks - first).clamp_(min=0), out=out).masked_fill_(ranks < 0, 0)


class NativePlaces(ctypes.Structure):
    """``Places`` of ``native/places.h``. Without ``starts`` all entries are selected."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offsets", "bits", "starts")),
        *((name, ctypes.c_int64) for name in ("segments", "numel")),
    )


def _unpack(bits: Tensor, start: int, stop: int) -> Tensor:
    return unpack_selection(bits[start // 8 : (stop + 7) // 8], stop - start)
