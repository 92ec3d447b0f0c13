"""A random selection that needs no sort, no stored mask and no generator state.

Each entry stays with probability ``density``, independently of the others: a hash of a key (seed, draw,
parameter name) and of the entry's flat index in the whole, unsharded parameter decides. The same entries
therefore stay on every device, at every world size, and again after a restart.

The hash is counter-based: multiplications and xor-shifts of 32-bit integers, each of which maps no two inputs
to one, so that neighbouring indices end far apart. It serves for sampling, not for secrets.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from gmt_tune.masking.bits import INT_DTYPE, row_major_blocks

CHUNK = 1 << 18  # entries hashed at a time on the CPU, where the scratch then stays in cache
_CHUNK_ON_DEVICE = 1 << 23

# Shifts and odd factors of a round each, and what the key adds to it (see _hash)
ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))


def random_key(seed: int, draw: int, name: str) -> int:
    """A 64-bit key for one parameter and one draw (a draw is a new selection: a step or a refresh).

    Args:
        seed: any whole number.
        draw: which selection, counted from 0.
        name: the parameter's name.
    """
    digest = hashlib.blake2b(f"{seed}/{draw}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def random_selection(start: int, stop: int, density: float, key: int, device: torch.device | str = "cpu") -> Tensor:
    """Which of the entries ``start..stop-1`` of a parameter stay.

    Args:
        start, stop: range of flat indices in the whole parameter.
        density: probability of each entry to stay, in (0, 1].
        key: from :func:`random_key`.
        device: where to compute; the result is the same everywhere.

    Returns:
        Bool tensor of ``stop - start`` entries.
    """
    selected = torch.empty(stop - start, dtype=torch.bool, device=device)
    draw = _Draw(density, key, selected.device)
    for first, last in draw.ranges(start, stop):
        selected[first - start : last - start] = draw(first, last).bool()
    return selected


def random_ranks(start: int, stop: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """What the entries ``start..stop-1`` of a parameter are drawn by, as numbers to rank them by.

    Returns:
        float32 tensor of ``stop - start`` whole numbers from 1 to 2**24, the largest of which are those that
        :func:`random_selection` draws.
    """
    ranks = torch.empty(stop - start, device=device)
    draw = _Draw(1.0, key, ranks.device)
    for first, last in draw.ranges(start, stop):
        ranks[first - start : last - start] = (1 << 23) - (draw.hash(first, last) >> 8)
    return ranks


@torch.no_grad()
def apply_random_(grad: Tensor, density: float, key: int, *, offset: int = 0) -> Tensor:
    """Zero, in place, all entries but a random fraction.

    Args:
        grad: a gradient, or a contiguous range of a larger one's flat entries; any strides.
        density: probability of each entry to stay, in (0, 1].
        key: from :func:`random_key`.
        offset: flat index in the whole parameter of this tensor's first entry.

    Returns:
        0-d int64 tensor: how many entries were drawn.
    """
    count = torch.zeros((), dtype=torch.int64, device=grad.device)
    draw = _Draw(density, key, grad.device)
    for begin, block in row_major_blocks(grad, draw.chunk):
        # Two ranges where the upper half of the indices changes within the block
        ranges = list(draw.ranges(offset + begin, offset + begin + block.numel()))
        kept = draw(*ranges[0]) if len(ranges) == 1 else torch.cat([draw(*range_).clone() for range_ in ranges])
        count += kept.sum(dtype=torch.int32)
        bits = block.view(INT_DTYPE[grad.dtype])
        bits.mul_(kept.to(bits.dtype).view(bits.shape))
    return count


def last_drawn(density: float) -> int:
    """The largest hash that is drawn: hashes are spread over all int32, and the density's share of them is."""
    return min(max(1, round(density * 2**32)), 2**32) - 2**31 - 1


class _Draw:
    """One draw's 0 or 1 for any range of flat indices, with scratch memory for ``chunk`` of them."""

    def __init__(self, density: float, key: int, device: torch.device) -> None:
        self.chunk = CHUNK if device.type == "cpu" else _CHUNK_ON_DEVICE
        self._key, self._last = key, last_drawn(density)
        self._counter = torch.arange(self.chunk, dtype=torch.int32, device=device)
        self._scratch = torch.empty(2, self.chunk, dtype=torch.int32, device=device)

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut a range so that each part fits the scratch and shares the upper half of its 64-bit indices."""
        while start < stop:
            end = min(stop, start + self.chunk, (start >> 32) + 1 << 32)
            yield start, end
            start = end

    def __call__(self, start: int, stop: int) -> Tensor:
        """int32, valid until the next call."""
        h = self.hash(start, stop)
        return torch.le(h, self._last, out=h)

    def hash(self, start: int, stop: int) -> Tensor:
        """The hashes themselves, spread over all int32; valid until the next call."""
        n = stop - start
        h, shifted = self._scratch[0, :n], self._scratch[1, :n]
        torch.add(self._counter[:n], signed(start), out=h)
        words = (self._key, self._key >> 32, (start >> 32) * 0x9E3779B9)
        for (shift, factor), word in zip(ROUNDS, words, strict=True):
            h.bitwise_xor_(signed(word))
            torch.bitwise_right_shift(h, shift, out=shifted)
            h.bitwise_xor_(shifted.bitwise_and_((1 << 32 - shift) - 1))  # int32 shifts in the sign: drop it
            h.mul_(signed(factor))
        return h


def signed(word: int, bits: int = 32) -> int:
    """The integer of so many bits, with a sign, that has the lower bits of another one."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >= 1 << bits - 1 else word
