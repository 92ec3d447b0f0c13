"""The k-th largest magnitude on the CPU, at about the speed of reading the entries once.

Every entry has a *key*: the 15 bits of its magnitude, for float32 of the magnitude rounded to bfloat16.
Rounding keeps the order, so the k-th largest entry has the k-th largest key. Then

1. a small random sample guesses the key K of the k-th largest entry, and how many entries share a key;
2. all entries with a key of at least K are counted, and the count corrects the guess, until
   #(key > K) < k <= #(key >= K). That proves K, whatever the sample said;
3. for float32, the few entries with key K are gathered and the right one among them is found directly.

Keys are made for a block of entries that fits the processor's cache, so counting again costs little. What
decides the speed is which torch operations are vectorised: comparing int16 into int16 and summing it in
int16 are; writing bool, ``nonzero``, bincount and sorting are not. Of a single tensor in bfloat16 or float32,
C++ counts the entries themselves instead, where it could be built (``native``).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import CDLL, byref, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from gmt_tune.masking import native
from gmt_tune.masking.bits import INFINITY_BITS, INT_DTYPE, NAN_BITS, magnitude_bits
from gmt_tune.masking.search.digits import kth_bits
from gmt_tune.masking.search.entries import Entries, Product

FEW = 1 << 12  # up to so many entries are ranked directly
BLOCK = 1 << 20  # entries whose keys are held at a time: 2 MB
ROW = 1 << 14  # entries whose hits are summed into one int16
SAMPLE = 1 << 12  # entries that guess for a block
LARGE_SAMPLE = 1 << 19  # entries that guess for many blocks
BATCH = 256  # sets of entries that are guessed for together
RADIUS = 4  # keys on either side of the guess among which entries are taken to be spread evenly
GROUP_BITS = 4
GROUP = 1 << GROUP_BITS  # words of hits that are searched as one
PIECE = 1 << 18  # entries in flight on the paths that are seldom taken
KEYS = 1 << 15
INFINITY_KEY = 0x7F80  # of float32
SMALLEST_NORMAL_KEY = 0x80  # of float32; what lies below, some processors round to zero

Counts = tuple[int, int, int]  # a key, how many entries have at least that key, how many are above it


class Rank(NamedTuple):
    """What a search found.

    Attributes:
        bits: magnitude bits of the k-th largest entry.
        selected: how many entries are at least as large and not zero.
        nonfinite: whether an entry is NaN or infinite.
    """

    bits: int
    selected: int
    nonfinite: bool


class Guess(NamedTuple):
    """A key that may be the k-th largest, and how many entries may have it; only the speed depends on it."""

    key: int
    per_key: float


class KeyBlock:
    """Scratch memory (4 MB) that holds the keys of at most BLOCK entries, and counts them."""

    def __init__(self) -> None:
        self._keys = torch.empty(BLOCK, dtype=torch.int16, device="cpu")
        self._hits = torch.empty(BLOCK, dtype=torch.int16, device="cpu")

    def load(self, tensors: Iterable[Tensor]) -> None:
        """Make the keys of these entries, and pad them to whole rows with -1, which no count sees."""
        n = 0
        for tensor in tensors:
            keys = self._keys[n : n + tensor.numel()].view(tensor.shape)
            if tensor.dtype == torch.float32:
                keys.view(torch.bfloat16).copy_(tensor)
                torch.bitwise_and(keys, 0x7FFF, out=keys)
            else:
                torch.bitwise_and(tensor.view(torch.int16), 0x7FFF, out=keys)
            n += tensor.numel()
        padded = -(-n // ROW) * ROW
        self.keys, self.hits = self._keys[:padded], self._hits[:padded]
        if n < padded:
            self.keys[n:] = -1

    def largest(self) -> int:
        """The largest loaded key."""
        return int(self.keys.max())

    def count(self, keys: Sequence[int]) -> list[int]:
        """How many loaded keys are at least as large as each of these."""
        return [
            sum(torch.ge(self.keys, key, out=self.hits).view(-1, ROW).sum(1, dtype=torch.int16).tolist())
            for key in keys
        ]

    def candidates(self, tensor: Tensor, key: int) -> Tensor:
        """Magnitude bits of those entries of the loaded float32 tensor that have this key; few should."""
        torch.eq(self.keys, key, out=self.hits)
        # nonzero() takes its time for each element: look at groups of words of 4 hits first, then closer.
        words = self.hits.view(torch.int64).view(-1, GROUP)
        groups = words.sum(1).nonzero().view(-1)
        at = words.index_select(0, groups).view(-1).nonzero().view(-1)
        first = ((groups.index_select(0, at >> GROUP_BITS) << GROUP_BITS) + (at & (GROUP - 1))) << 2
        near = (first[:, None] + torch.arange(4, device="cpu")).view(-1)
        hits = self.hits.index_select(0, near).bool()
        near.clamp_(max=tensor.numel() - 1)  # only the padding, which has no hits, lies beyond
        return magnitude_bits(tensor.reshape(-1).index_select(0, near)).masked_select(hits)


class HeldKeys:
    """Counts entries of which all keys fit into the block: they are made once."""

    at_once = 1  # counting for another key costs little, so count for one and learn from it

    def __init__(self, entries: Entries, block: KeyBlock) -> None:
        self._block = block
        self._tensors = list(entries.blocks(BLOCK))
        block.load(self._tensors)
        self.largest = block.largest()
        self.count = block.count

    def candidates(self, key: int) -> Tensor:
        flat = self._tensors[0] if len(self._tensors) == 1 else torch.cat([t.reshape(-1) for t in self._tensors])
        return self._block.candidates(flat, key)


class PassingKeys:
    """Counts entries whose keys are made at each count, block by block."""

    at_once = 2  # where the guess is right, one pass proves it

    def __init__(self, entries: Entries, block: KeyBlock) -> None:
        self._entries, self._block = entries, block
        self._gathers = entries.dtype == torch.float32
        self._gathered: tuple[int, list[Tensor]] = (-1, [])
        self.largest = 0

    def count(self, keys: Sequence[int]) -> list[int]:
        totals = [0] * len(keys)
        gathered: list[Tensor | None] = []
        for tensor in self._entries.blocks(BLOCK):
            self._block.load([tensor])
            self.largest = max(self.largest, self._block.largest())
            counts = self._block.count(keys)
            totals = [total + more for total, more in zip(totals, counts, strict=True)]
            # The first key is likely the right one: gather its entries while they are at hand, if they are few.
            if self._gathers and len(keys) == 2 and counts[0] - counts[1] <= tensor.numel() // 32:
                gathered.append(self._block.candidates(tensor, keys[0]))
            else:
                gathered.append(None)
        parts = [part for part in gathered if part is not None]
        if len(parts) == len(gathered):
            self._gathered = keys[0], parts
        return totals

    def candidates(self, key: int) -> Tensor:
        if self._gathered[0] != key:
            parts = []
            for tensor in self._entries.blocks(BLOCK):
                self._block.load([tensor])
                parts.append(self._block.candidates(tensor, key))
            self._gathered = key, parts
        return torch.cat(self._gathered[1])


class NativeKeys:
    """Counts entries by C++, which makes no keys: it knows the smallest magnitude that has a key."""

    at_once = 2

    def __init__(self, tensor: Tensor, library: CDLL) -> None:
        self._given, self._library = native.entries(tensor), library
        self._is_float32 = tensor.dtype == torch.float32
        self._counted = {KEYS: 0}
        self.largest = 0

    def count(self, keys: Sequence[int]) -> list[int]:
        counts, largest = (c_int64 * 2)(), c_int64()
        bounds = self._smallest(keys[0]), self._smallest(keys[-1])
        self._library.count_entries(*self._given, *bounds, counts, byref(largest), torch.get_num_threads())
        self.largest = largest.value >> 16 if self._is_float32 else largest.value
        self._counted.update(zip(keys, counts, strict=False))
        return counts[: len(keys)]

    def candidates(self, key: int) -> Tensor:
        picked = torch.empty(self._counted[key] - self._counted[key + 1], dtype=torch.int32, device="cpu")
        bounds = self._smallest(key), self._smallest(key + 1)
        self._library.pick_between(*self._given[:2], *bounds, native.pointer(picked), torch.get_num_threads())
        return picked

    def _smallest(self, key: int) -> int:
        """Magnitude bits of the smallest entry with this key: a float32 halfway between two rounds to the even one."""
        return max(0, (key << 16) - 0x8000 + (key & 1)) if self._is_float32 else key


def kth_largest(sets: Sequence[Sequence[Tensor | Product]], ks: Sequence[int]) -> list[Rank]:
    """The k-th largest magnitude of each of several sets of entries.

    Args:
        sets: tensors or products whose entries are ranked together; none empty; any shapes and strides;
            float32, bfloat16 or float16.
        ks: for each set the rank from the top, 1 to its number of entries.
    """
    entries = [Entries(one) for one in sets]
    ranks: dict[int, Rank] = {}
    same_size: dict[tuple, list[int]] = {}
    large = []
    for i, e in enumerate(entries):
        if e.numel <= FEW:
            same_size.setdefault((e.dtype, e.numel, ks[i]), []).append(i)
        else:
            large.append(i)
    for (dtype, _, k), members in same_size.items():
        for some in _batches(members):
            ranks.update(zip(some, _rank_directly([entries[i] for i in some], k, dtype), strict=True))
    if large:
        block = KeyBlock()
        for some in _batches(large):
            guesses = guess_keys([entries[i] for i in some], [ks[i] for i in some])
            for i, guess in zip(some, guesses, strict=True):
                ranks[i] = _rank(entries[i], ks[i], guess, block)
    return [_with_one_nan(ranks[i], entries[i]) for i in range(len(sets))]


def search(k: int, n: int, guess: Guess, count: Callable[[list[int]], list[int]], at_once: int = 1) -> Counts:
    """The k-th largest of n keys.

    Args:
        k: rank from the top.
        n: number of keys.
        guess: where to begin.
        count: how many keys are at least as large as each of these.
        at_once: how many neighbouring keys to count for in one go, 1 or 2.
    """
    low, at_low = 0, n  # at least k keys are at least as large
    high, at_high = KEYS, 0  # fewer than k are
    key, per_key = min(max(guess.key, 1), KEYS - 1), max(guess.per_key, 1.0)
    rounds = 0
    while high - low > 1:
        keys = [key, key + 1] if at_once == 2 and key + 1 < high else [key]
        counts = count(keys)
        for at, counted in zip(keys, counts, strict=True):
            if counted >= k and at > low:
                low, at_low = at, counted
            elif counted < k and at < high:
                high, at_high = at, counted
        rounds += 1
        # Newton's step from the count; where the guess misleads it, halve what is left instead.
        key = key + int((counts[0] - k) // per_key) if rounds < 6 else (low + high) // 2
        key = min(max(key, low + 1), high - 1)
    return low, at_low, at_high


def guess_keys(entries: Sequence[Entries], ks: Sequence[int]) -> list[Guess]:
    """A guess for each set of entries, from a few random ones; all sets together, a bit at a time."""
    rows = torch.full((len(entries), SAMPLE), -1, dtype=torch.int16, device="cpu")
    ranks = []
    for row, e, k in zip(rows, entries, ks, strict=True):
        bits = (sample := e.sample(SAMPLE)[:SAMPLE]).view(INT_DTYPE[e.dtype])
        row[: bits.numel()] = bits >> 16 if e.dtype == torch.float32 else bits
        row[: bits.numel()] &= 0x7FFF
        ranks.append(min(sample.numel(), max(1, round(k * sample.numel() / e.numel))))
    ranks = torch.tensor(ranks, dtype=torch.int16, device="cpu")[:, None]
    hits = torch.empty_like(rows)

    def count(keys: Tensor) -> Tensor:
        return torch.ge(rows, keys, out=hits).sum(1, keepdim=True, dtype=torch.int16)

    keys = torch.zeros_like(ranks)
    for bit in reversed(range(15)):
        higher = keys | (1 << bit)
        keys = torch.where(count(higher) >= ranks, higher, keys)
    near = count((keys - RADIUS).clamp_(min=0)) - count(keys + RADIUS + 1)
    scales = [e.numel / SAMPLE / (2 * RADIUS + 1) for e in entries]
    return [
        Guess(key, n * scale)
        for key, n, scale in zip(keys.view(-1).tolist(), near.view(-1).tolist(), scales, strict=True)
    ]


def _rank(entries: Entries, k: int, guess: Guess, block: KeyBlock) -> Rank:
    source: NativeKeys | HeldKeys | PassingKeys
    if entries.numel > BLOCK:
        guess = _guess_from_sample(entries, k, guess, block)
    library = None if entries.only is None else native.load_for(entries.only)
    if library is not None and entries.only is not None:
        source = NativeKeys(entries.only, library)
    else:
        source = (HeldKeys if entries.numel <= BLOCK else PassingKeys)(entries, block)
    key, at_key, above = search(k, entries.numel, guess, source.count, source.at_once)
    if entries.dtype != torch.float32:
        return Rank(key, at_key if key else above, source.largest >= INFINITY_BITS[entries.dtype])
    # The largest finite float32 round to infinity: look again.
    nonfinite = source.largest >= INFINITY_KEY and not all(b.isfinite().all() for b in entries.blocks(PIECE))
    if key <= SMALLEST_NORMAL_KEY or at_key - above > entries.numel // 32 + FEW:
        return Rank(*_rank_among_ties(entries, k), nonfinite)
    bits = source.candidates(key)
    kth = bits.kthvalue(bits.numel() - (k - above) + 1).values
    return Rank(int(kth), above + int((bits >= kth).sum()), nonfinite)


def _guess_from_sample(entries: Entries, k: int, guess: Guess, block: KeyBlock) -> Guess:
    """The same search, among the entries of a large sample."""
    sample = entries.sample(LARGE_SAMPLE)[:BLOCK]
    scale = entries.numel / sample.numel()
    block.load([sample])
    k = min(sample.numel(), max(1, round(k / scale)))
    key, at_key, above = search(k, sample.numel(), Guess(guess.key, guess.per_key / scale), block.count)
    return Guess(key, (at_key - above) * scale)


def _rank_among_ties(entries: Entries, k: int) -> tuple[int, int]:
    """Bits of the k-th largest float32 entry and number of selected ones, where many have its key.

    Most often they are zeros; else they are counted digit by digit. Also where the key is too small to trust.
    """
    without_sign = (block.view(torch.int32) << 1 for block in entries.blocks(PIECE))
    nonzero = sum(int(torch.count_nonzero(bits)) for bits in without_sign)
    if nonzero < k:
        return 0, nonzero
    kth = int(kth_bits(lambda: entries.blocks(PIECE), k, torch.float32))
    return kth, sum(int((magnitude_bits(block) >= kth).sum()) for block in entries.blocks(PIECE))


def _rank_directly(entries: Sequence[Entries], k: int, dtype: torch.dtype) -> list[Rank]:
    """Of sets of at most FEW entries, as many in each."""
    bits = magnitude_bits(torch.stack([e.sample(FEW) for e in entries]))
    kth = bits.kthvalue(bits.shape[1] - k + 1, dim=1, keepdim=True).values
    selected = (bits >= kth.clamp(min=1)).sum(1)
    nonfinite = (bits >= INFINITY_BITS[dtype]).any(1)
    return [Rank(*rank) for rank in zip(kth.view(-1).tolist(), selected.tolist(), nonfinite.tolist(), strict=True)]


def _with_one_nan(rank: Rank, entries: Entries) -> Rank:
    """NaNs of different bits have the same rank."""
    if rank.bits <= INFINITY_BITS[entries.dtype]:
        return rank
    return Rank(NAN_BITS[entries.dtype], sum(int(b.isnan().sum()) for b in entries.blocks(PIECE)), True)


def _batches(members: Sequence[int]) -> Iterator[Sequence[int]]:
    return (members[i : i + BATCH] for i in range(0, len(members), BATCH))
