"""Random words and dropout masks inside Triton kernels: those of csrc/philox.h, to the bit."""

from __future__ import annotations

import triton
import triton.language as tl

MULTIPLIER0, MULTIPLIER1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
KEY_STEP0, KEY_STEP1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(7)  # enough to pass BigCrush (Salmon et al. 2011, table 2)


@triton.jit
def seeded(seed, rows):
    """The seed, and the numbers of an op's rows in the stream, modulo 2**32, from an int64 [2]: seed and first row."""
    return tl.load(seed), rows.to(tl.uint32) + tl.load(seed + 1).to(tl.uint32)


@triton.jit
def words(seed, c0, c1, c2, c3):
    """Philox4x32-7: the four random words of a counter of four numbers below 2**32; seed is an int64.

    A product of 64 bits is one instruction. `tl.philox` takes two, one for each half.
    """
    c0, c1, c2, c3 = tl.cast(c0, tl.uint32), tl.cast(c1, tl.uint32), tl.cast(c2, tl.uint32), tl.cast(c3, tl.uint32)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        product0, product1 = c0.to(tl.uint64) * MULTIPLIER0, c2.to(tl.uint64) * MULTIPLIER1
        c0, c1, c2, c3 = (
            (product1 >> 32).to(tl.uint32) ^ c1 ^ key0,
            product1.to(tl.uint32),
            (product0 >> 32).to(tl.uint32) ^ c3 ^ key1,
            product0.to(tl.uint32),
        )
        key0, key1 = key0 + KEY_STEP0, key1 + KEY_STEP1
    return c0, c1, c2, c3


@triton.jit
def word(seed, c0, c1, c2, c3, index):
    """The word of that index, from 0 to 3."""
    w0, w1, w2, w3 = words(seed, c0, c1, c2, c3)
    return tl.where(index < 2, tl.where(index == 0, w0, w1), tl.where(index == 2, w2, w3))
