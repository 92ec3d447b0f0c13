"""What the kernels share: which entries a program has, and the integers by which they are ranked.

    bits(x) = the bits of x as an integer, without the sign

Every NaN ranks like the smallest one: no count asks for more.

All get the constants of their table: RANKED_BY ("first": the entry itself, "product": first times second,
"second"), the dtypes FIRST, SECOND and SCORE, integers of the same widths, the MASK that drops the sign, the
smallest NAN, and whether the SECOND_ALIGNED pointers are multiples of 16 bytes, as the first ones are.
"""

import triton
import triton.language as tl


@triton.jit
def as_pointers(first, second, FIRST_INT: tl.constexpr, SECOND_INT: tl.constexpr, SECOND_ALIGNED: tl.constexpr):
    """A tensor's two addresses as pointers to integers."""
    first_pointer = tl.multiple_of(first.to(tl.pointer_type(FIRST_INT)), 16)
    second_pointer = second.to(tl.pointer_type(SECOND_INT))
    if SECOND_ALIGNED:
        second_pointer = tl.multiple_of(second_pointer, 16)
    return first_pointer, second_pointer


@triton.jit
def load_tile(first_pointer, second_pointer, low, high, TILE: tl.constexpr, HAS_SECOND: tl.constexpr):
    """The TILE entries from the pointers on, as integers; 0 where the position is not in low..high-1."""
    offsets = tl.arange(0, TILE)
    # Without a mask, loads are as wide as they can be
    if (low <= 0) & (high >= TILE):
        first = tl.load(first_pointer + offsets)
        if HAS_SECOND:
            second = tl.load(second_pointer + offsets)
        else:
            second = first
    else:
        inside = (offsets >= low) & (offsets < high)
        first = tl.load(first_pointer + offsets, mask=inside, other=0)
        if HAS_SECOND:
            second = tl.load(second_pointer + offsets, mask=inside, other=0)
        else:
            second = first
    return first, second


@triton.jit
def magnitude_bits(
    first, second, RANKED_BY: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SCORE: tl.constexpr,
    SCORE_INT: tl.constexpr, MASK: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """int32 ranks of entries that were loaded as integers."""
    if RANKED_BY == "first":
        bits = first.to(tl.int32) & MASK
    elif RANKED_BY == "second":
        bits = second.to(tl.int32) & MASK
    else:
        # As PyTorch multiplies: in float32, rounded once to the nearest, and to the even one of two
        product = first.to(FIRST, bitcast=True).to(tl.float32) * second.to(SECOND, bitcast=True).to(tl.float32)
        if SCORE == tl.bfloat16:
            wide = product.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            bits = tl.where(wide > 0x7F800000, NAN, (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16)
        else:
            bits = product.to(SCORE).to(SCORE_INT, bitcast=True).to(tl.int32) & MASK
    return bits
