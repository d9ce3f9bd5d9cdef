"""Random words and dropout masks inside Triton kernels: those of csrc/philox.h, to the bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def seeded(seed, rows):
    """The seed, and the numbers of an op's rows in the stream, modulo 2**32, from an int64 [2]: seed and first row."""
    return tl.load(seed), rows.to(tl.uint32) + tl.load(seed + 1).to(tl.uint32)


@triton.jit
def words(seed, c0, c1, c2, c3):
    """Philox4x32-10: the four random words of a counter of four numbers below 2**32; seed is an int64."""
    c0, c1, c2, c3 = tl.cast(c0, tl.uint32), tl.cast(c1, tl.uint32), tl.cast(c2, tl.uint32), tl.cast(c3, tl.uint32)
    return tl.philox(seed.to(tl.uint64, bitcast=True), c0, c1, c2, c3)


@triton.jit
def word(seed, c0, c1, c2, c3, index):
    """The word of that index, from 0 to 3."""
    w0, w1, w2, w3 = words(seed, c0, c1, c2, c3)
    return tl.where(index < 2, tl.where(index == 0, w0, w1), tl.where(index == 2, w2, w3))
