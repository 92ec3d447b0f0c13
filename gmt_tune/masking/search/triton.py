"""Thresholds of all tensors on a GPU in a few launches, without waiting for the device, and their application.

The search is that of the CPU, for all sets of entries at once:

1. a random sample of each set guesses a window of magnitudes that holds the threshold (``kernels/sample.py``);
2. all entries are counted by the window's bins (``kernels/count.py``), and the counts say which bin holds the
   threshold, or on which side of the window it lies (``kernels/narrow.py``). So on, until one magnitude is left.

Counts alone decide, so the threshold is exact whatever the sample said. The host cannot know how many counts it
takes without waiting, so it launches as many as it can ever take: each narrows what is left to the width of a
bin. For 16-bit entries the first is enough but for heavy tails, for float32 the fourth or fifth; those after it end
at once.
"""

import contextlib
import functools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gmt_tune.masking.bits import INFINITY_BITS, MAGNITUDE_MASK, NAN_BITS, from_bits, smallest_selected_bits
from gmt_tune.masking.search.entries import Product
from gmt_tune.masking.search.kernels.apply import apply_smallest_
from gmt_tune.masking.search.kernels.apply_packed import apply_packed_
from gmt_tune.masking.search.kernels.count import count_in_windows, zero_counts
from gmt_tune.masking.search.kernels.draw import apply_draws_
from gmt_tune.masking.search.kernels.narrow import narrow_windows
from gmt_tune.masking.search.kernels.pack import pack_
from gmt_tune.masking.search.kernels.place import count_by_segment, place_
from gmt_tune.masking.search.kernels.sample import sample_windows
from gmt_tune.masking.search.kernels.tables import ALIGNMENT, Table, is_covered, make_table, to_device

BINS = 32  # as many as a word has bits: see the counting kernel


class Search:
    """Sets of entries that were searched together, for what follows with the same tensors.

    Args:
        table: of the sets.
        members: their tensors or products, all in one list.
        bits: int64 [sets], the thresholds' magnitude bits.
    """

    def __init__(self, table: Table, members: Sequence[Tensor | Product], bits: Tensor) -> None:
        self.table, self._members, self._bits = table, members, bits

    def is_of(self, members: Sequence[Tensor | Product]) -> bool:
        return len(members) == len(self._members) and all(map(operator.is_, members, self._members))

    @functools.cached_property
    def smallest(self) -> Tensor:
        """int32 [tensors], the magnitude bits from which entries are selected."""
        return self._bits.clamp(min=1).to(torch.int32)[self.table.sets[: self.table.num_tensors]]


def kth_largest(
    sets: Sequence[Sequence[Tensor | Product]], ks: Sequence[int]
) -> list[tuple[Tensor, list[Tensor], Search]]:
    """The k-th largest magnitude of each of several sets of entries.

    Args:
        sets: tensors, or products, whose entries are ranked together; ``can_search`` each set.
        ks: for each set the rank from the top, 1 to its number of entries.

    Returns:
        For each set a 0-d threshold in its dtype, for each of its tensors a 0-d bool tensor: whether it holds NaN or
        infinity, and the search that it was found in.
    """
    found: list[Any] = [None] * len(sets)
    for members in _groups([one[0] for one in sets]):
        some = [sets[i] for i in members]
        dtype, device = some[0][0].dtype, some[0][0].device
        with on_device(device):
            table = make_table(some)
            bits, largest = _search(table, [ks[i] for i in members], dtype)
        search = Search(table, [member for one in some for member in one], bits)
        values = from_bits(torch.where(bits > INFINITY_BITS[dtype], NAN_BITS[dtype], bits), dtype).unbind()
        flags = iter((largest >= INFINITY_BITS[dtype]).unbind())
        for i, value in zip(members, values, strict=True):
            found[i] = (value, [next(flags) for _ in sets[i]], search)
    return found


def can_search(tensors: Sequence[Tensor | Product], dtype: torch.dtype) -> bool:
    """Whether these tensors, compared in a dtype, are of one kind and lie as the kernels need them."""
    is_one_kind = len(tensors) == 1 or len(_groups(tensors)) == 1
    return is_one_kind and tensors[0].dtype == dtype and all(map(is_covered, tensors))


def can_apply(grad: Tensor, score: Tensor | Product) -> bool:
    """Whether the kernels can zero entries of this gradient by this score."""
    if score is grad or isinstance(score, Product):
        return is_covered(score)
    return grad.is_contiguous() and score.is_contiguous()


def can_pack(entries: Tensor | Product) -> bool:
    """Whether the kernels can pack a selection of these entries, or apply a packed one to them."""
    if isinstance(entries, Product):
        return entries.weight.is_contiguous() and can_pack(entries.grad)
    return entries.is_contiguous() and entries.data_ptr() % ALIGNMENT == 0


def apply_thresholds_(
    grads: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    scores: Sequence[Tensor | Product],
    searches: Sequence[Search | None],
) -> list[Tensor]:
    """Zero what thresholds do not select of gradients that ``can_apply``, none empty; own counts, 0-d int64."""
    counts: list[Any] = [None] * len(grads)
    for members, table, smallest in _thresholds_by_kind(grads, thresholds, scores, searches):
        _scatter(apply_smallest_(table, smallest).unbind(), members, counts)
    return counts


def pack_thresholds(
    scores: Sequence[Tensor | Product], thresholds: Sequence[Tensor], searches: Sequence[Search | None]
) -> list[Tensor]:
    """What thresholds select of scores that ``can_pack``, none empty, as ``packing.pack_selection`` packs it."""
    packed = [torch.empty(-(-score.numel() // 8), dtype=torch.uint8, device=score.device) for score in scores]
    for members, table, smallest in _thresholds_by_kind(scores, thresholds, scores, searches):
        pack_(table, smallest, [packed[i] for i in members])
    return packed


def place_thresholds(
    scores: Sequence[Tensor | Product],
    thresholds: Sequence[Tensor],
    searches: Sequence[Search | None],
    ks: Sequence[int],
    segment: int,
    run: int,
) -> list[tuple[int, tuple[Tensor, Tensor, Tensor | None]]]:
    """Where the entries are that thresholds select, without the ties that are too many. Waits for the device once.

    Args:
        scores: which ``can_pack``, none empty.
        ks: how many entries of each may be selected: more than are above its threshold.
        segment, run: as of :mod:`gmt_tune.masking.places`.

    Returns:
        For each, how many entries are selected, and what its ``Lookup`` holds.
    """
    counted = []
    for members, table, smallest in _thresholds_by_kind(scores, thresholds, scores, searches):
        counted.append((members, table, smallest, *count_by_segment(table, smallest, segment)))
    placed: list[Any] = [None] * len(scores)
    for members, table, smallest, sums, totals in counted:
        all_kept, device = [], smallest.device
        for i, above, tied in zip(members, *totals.tolist(), strict=True):
            all_kept.append(min(tied, max(0, ks[i] - above)))
            placed[i] = _room_for(above + all_kept[-1], scores[i].numel(), device, segment, run)
        with on_device(device):
            place_(table, smallest, sums, all_kept, [placed[i][1] for i in members], segment, run)
    return placed


def _room_for(
    count: int, numel: int, device: torch.device, segment: int, run: int
) -> tuple[int, tuple[Tensor, Tensor, Tensor | None]]:
    """Memory for so many entries' places: 16 bits each or 1 bit for each entry, whichever is less."""
    segments = -(-numel // segment)
    starts = torch.empty(segments + 1, dtype=torch.int64, device=device)
    if 2 * count < -(-numel // 8):
        return count, (torch.empty(count, dtype=torch.int16, device=device), starts, None)
    bits = torch.empty(-(-numel // run) * (run // 8), dtype=torch.uint8, device=device)
    return count, (bits, starts, torch.empty(segments * (segment // run), dtype=torch.int16, device=device))


def apply_packed_selections_(grads: Sequence[Tensor], packed: Sequence[Tensor]) -> list[Tensor]:
    """Zero what packed selections do not hold of gradients that ``can_pack``, none empty; own counts, 0-d int64."""
    counts: list[Any] = [None] * len(grads)
    for members in _groups(grads):
        with on_device(grads[members[0]].device):
            table = make_table([[grads[i]] for i in members])
            _scatter(apply_packed_(table, [packed[i] for i in members]).unbind(), members, counts)
    return counts


def apply_random_draws_(
    grads: Sequence[Tensor], draws: Sequence[tuple[int, int, int]], rounds: tuple[tuple[int, int], ...]
) -> list[Tensor]:
    """Zero what draws leave out of contiguous gradients, none empty; see ``kernels/draw.py``. Own counts, 0-d int64."""
    counts: list[Any] = [None] * len(grads)
    for members in _groups(grads):
        with on_device(grads[members[0]].device):
            table = make_table([[grads[i]] for i in members])
            _scatter(apply_draws_(table, [draws[i] for i in members], rounds).unbind(), members, counts)
    return counts


def _thresholds_by_kind(
    grads: Sequence[Tensor | Product],
    thresholds: Sequence[Tensor],
    scores: Sequence[Tensor | Product],
    searches: Sequence[Search | None],
) -> Iterator[tuple[list[int], Table, Tensor]]:
    """Positions of those that one launch can cover, with their table and smallest selected bits."""
    kinds: dict[tuple, list[int]] = {}
    for i, (grad, threshold, score) in enumerate(zip(grads, thresholds, scores, strict=True)):
        ranks_itself = score is grad or isinstance(score, Product)
        kind = (ranks_itself, isinstance(score, Product), grad.device, grad.dtype, score.dtype, threshold.dtype)
        kinds.setdefault(kind, []).append(i)
    for (ranks_itself, *_), members in kinds.items():
        some = [scores[i] for i in members]
        with on_device(some[0].device):
            search = searches[members[0]]
            if ranks_itself and search is not None and search.is_of(some):
                yield members, search.table, search.smallest
                continue
            values = torch.stack([thresholds[i].detach().to(some[0].device) for i in members])
            own = None if ranks_itself else some
            table = make_table([[some[n] if ranks_itself else grads[i]] for n, i in enumerate(members)], own)
            yield members, table, smallest_selected_bits(values, some[0].dtype)


def _scatter(values: Iterable[Tensor], positions: Sequence[int], into: list[Any]) -> None:
    for i, value in zip(positions, values, strict=True):
        into[i] = value


def _search(table: Table, ks: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int64 [sets], the magnitude bits of each set's k-th largest, and int32 [tensors], of the largest."""
    device, bins, key_bits = table.pointers.device, BINS, MAGNITUDE_MASK[dtype].bit_length()
    ranks = to_device(ks, device)
    state = sample_windows(table, ranks, bins, key_bits)
    counts = zero_counts(len(ks), bins, device)
    largest = torch.zeros(table.num_tensors, dtype=torch.int32, device=device)
    for i in range(1 + math.ceil(key_bits / math.log2(bins))):
        count_in_windows(table, state, counts, largest if i == 0 else None)
        narrow_windows(counts, ranks, state, INFINITY_BITS[dtype] + 1)
    return state[0], largest


class Counter:
    """Counts the entries of several tensors by digits of their magnitude, in a launch for each kind of tensor.

    Args:
        members: tensors or products of one dtype on one device; ``can_search`` each.
    """

    def __init__(self, members: Sequence[Tensor | Product]) -> None:
        self._members = list(members)
        self._tables: list[tuple[Tensor, Table]] = []

    def count(self, prefixes: Tensor, shift: int, width: int, with_flag: bool) -> Tensor:
        """The counts of ``digits``, by the digit of ``width`` bits, ``shift`` bits from the right.

        Args:
            prefixes: int64 [members], the digits above.
            with_flag: look whether a member holds NaN or infinity.

        Returns:
            int64 [members, 2**width + 1]; the last column is 1 for a member that does, 0 for the others.
        """
        device, bins = prefixes.device, 1 << width
        with on_device(device):
            if not self._tables:
                groups = _groups(self._members)
                self._tables = [(to_device(m, device), make_table([[self._members[i]] for i in m])) for m in groups]
            counts = prefixes.new_zeros(len(prefixes), bins + 1)
            for members, table in self._tables:
                windows = prefixes[members] << (shift + width)
                lows = torch.zeros_like(windows)
                state = (lows, lows + 2, windows, lows + shift)  # low and high say that the search goes on
                counted = zero_counts(len(members), bins, device)
                largest = torch.zeros(len(members), dtype=torch.int32, device=device) if with_flag else None
                count_in_windows(table, state, counted, largest)
                flags = lows if largest is None else (largest >= INFINITY_BITS[self._members[0].dtype]).long()
                counts[members] = torch.cat([counted, flags[:, None]], 1)
        return counts


def _groups(members: Sequence[Tensor | Product]) -> list[list[int]]:
    """Positions of those that one launch can cover together."""
    groups: dict[tuple, list[int]] = {}
    for i, member in enumerate(members):
        key = (type(member) is Product, member.device, member.dtype)
        if isinstance(member, Product):
            key += (member.grad.dtype, member.weight.dtype)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
