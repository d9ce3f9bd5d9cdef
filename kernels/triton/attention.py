"""Attention within each sequence of a packed stream, forward and backward.

A program takes one tile of rows and, one after another, up to 4 heads, whose random words come from the same Philox
counters: bit h of an integer says whether head h of the 4 keeps a probability. Sequences of up to 128 tokens share
tiles (`tiles`, `starts`: kernels/attention.py makes them); without that table, and for longer ones, a tile is a
sequence. Up to 64 rows, all of a tile's scores are there at once; beyond, the softmax runs over blocks of keys
(Milakov and Gimelshein 2018, Dao et al. 2022).

Inside a program rows count from the tile's first, and scores are in units of log(2), for exp2 is what the hardware
has. Over blocks, the forward leaves `lse` [H, N], log2 of the sum of 2**score, for the backward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..attention import tile_rows
from . import philox
from .ahead import ARCHITECTURES, Compilation

LOG2_E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TILE = tl.constexpr(128)  # the most rows of a tile of several sequences


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _at(rows, stride, PAD: tl.constexpr):
    """Where the elements of each row are, as [rows, PAD]."""
    return rows[:, None] * stride + tl.arange(0, PAD)[None, :]


@triton.jit
def _there(inside, D: tl.constexpr, PAD: tl.constexpr):
    """Which of those are elements: the first D of each row that is inside."""
    if D < PAD:
        return inside[:, None] & (tl.arange(0, PAD) < D)[None, :]
    else:
        return inside[:, None]


@triton.jit
def _base(highest):
    """What scores are taken relative to: their highest, and 0 for rows that have none."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _no_bits(ROWS: tl.constexpr, COLUMNS: tl.constexpr, like):
    """Zeros, as a product: the compiler then keeps them, and what is added to them, where it keeps scores."""
    return _dot(tl.zeros([ROWS, 16], like), tl.zeros([16, COLUMNS], like)).to(tl.int32)


@triton.jit
def _kept_one(key_position, query_row, head, site, seed, least):
    w0, w1, w2, w3 = philox.words(seed, key_position, query_row, head // 4, site)
    low = (w0 >= least).to(tl.int32) | (w1 >= least).to(tl.int32) << 1
    return (low | (w2 >= least).to(tl.int32) << 2 | (w3 >= least).to(tl.int32) << 3) >> head % 4


@triton.jit
def _kept(seed, site, threshold, head, query_rows, key_positions):
    """Bit h: whether head + h keeps the probability; h goes up to the last head of the same Philox counter."""
    seed, query_rows = philox.seeded(seed, query_rows)
    least = tl.cast(threshold, tl.uint32)
    if INTERPRETED:
        return _kept_one(key_positions, query_rows, head, site, seed, least)
    else:  # element after element: step after step of all elements would keep all their states in registers
        return tl.map_elementwise(_kept_one, key_positions, query_rows, head, site, seed, least)


@triton.jit
def _tile(cu_seqlens, tiles, index):
    """A tile's first row and how many it has; where there is no table, a tile is a sequence."""
    if tiles is None:
        first, end = tl.load(cu_seqlens + index), tl.load(cu_seqlens + index + 1)
    else:
        first, end = tl.load(tiles + 2 * index), tl.load(tiles + 2 * index + 1)
    return first, end - first


@triton.jit
def _begins(starts, first, rows, size):
    """Where the sequence of each row begins; -1 for rows outside the tile."""
    if starts is None:
        return tl.where(rows < size, 0, -1)
    else:
        return tl.load(starts + first + rows, mask=rows < size, other=first - 1) - first


@triton.jit
def _within(begins, rows, low, high):
    """The same, with -2 for rows outside [low, high)."""
    return tl.where((rows >= low) & (rows < high), begins, -2)


@triton.jit
def _next(low, high, check, again, starts, first, size):
    """Which rows to do after [low, high): none, as a rule, for that was the whole tile.

    But a masked probability is 0, and 0 times NaN or infinity is NaN: a tile of several sequences in which some result
    is NaN, as `check` then is, is done `again`, sequence by sequence.
    """
    if starts is None:
        return high, high
    else:
        spoiled = tl.max((check != check).to(tl.int32), 0) != 0
        low = tl.where(again & spoiled, low, high)
        if low < size:
            high = low + tl.sum((_begins(starts, first, tl.arange(0, TILE), size) == low).to(tl.int32), 0)
        return low, high


@triton.jit(do_not_specialize=["site", "threshold"])
def _forward_whole(
    qkv, out, cu_seqlens, tiles, starts, seed, site, threshold, keep_scale, scale, heads,
    token_stride, part_stride, head_stride,
    D: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """All of a tile's scores at once. Moves 4 elements a token and channel."""
    first, size = _tile(cu_seqlens, tiles, tl.program_id(0))
    head = tl.program_id(1) * HEADS
    rows = tl.arange(0, KEYS)
    begins = _begins(starts, first, rows, size)
    qkv += first.to(tl.int64) * token_stride + head * head_stride
    out += (first.to(tl.int64) * heads + head) * D
    if DROPOUT:
        bits = _kept(seed, site, threshold, head, (first + rows)[:, None], (rows - begins)[None, :])
    low, high, again = 0, size, True
    while low < high:
        own = _within(begins, rows, low, high)
        at, mask = _at(rows, token_stride, PAD), _there(own >= 0, D, PAD)
        out_at = _at(rows, heads * D, PAD)
        check = tl.zeros([KEYS], tl.float32)
        for h in tl.range(0, tl.minimum(HEADS, heads - head)):
            q = tl.load(qkv + h * head_stride + at, mask=mask, other=0.0)
            k = tl.load(qkv + h * head_stride + part_stride + at, mask=mask, other=0.0)
            v = tl.load(qkv + h * head_stride + 2 * part_stride + at, mask=mask, other=0.0)
            scores = tl.where(own[:, None] == own[None, :], _dot(q, tl.trans(k)) * (scale * LOG2_E), float("-inf"))
            p = tl.exp2(scores - _base(tl.max(scores, 1))[:, None])
            total = tl.sum(p, 1)
            if DROPOUT:
                p = tl.where((bits & (1 << h)) != 0, p, 0.0)
            mixed = _dot(p.to(v.dtype), v)
            tl.store(out + h * D + out_at, (mixed * (keep_scale / total)[:, None]).to(v.dtype), mask=mask)
            check += tl.sum(mixed, 1)
        low, high = _next(low, high, check, again, starts, first, size)
        again = False


@triton.jit(do_not_specialize=["site", "tokens", "threshold", "blocks"])
def _forward_blocks(
    qkv, out, lse, cu_seqlens, tiles, starts, seed, site, threshold, keep_scale, scale, tokens, heads, blocks,
    token_stride, part_stride, head_stride,
    D: tl.constexpr, PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """One block of a tile's queries, over blocks of its keys."""
    first, size = _tile(cu_seqlens, tiles, tl.program_id(0) // blocks)
    top = tl.program_id(0) % blocks * QUERIES
    head = tl.program_id(1) * HEADS
    queries = top + tl.arange(0, QUERIES)
    begins = _begins(starts, first, queries, size)
    qkv += first.to(tl.int64) * token_stride + head * head_stride
    out += (first.to(tl.int64) * heads + head) * D
    lse += head * tokens + first
    key_blocks = tl.where(top < size, tl.cdiv(size, KEYS), 0)
    bits = _no_bits(QUERIES, KEYS, qkv.dtype.element_ty)
    if DROPOUT and HEADS > 1:
        for block in tl.range(0, key_blocks):
            keys = block * KEYS + tl.arange(0, KEYS)
            positions = keys - _begins(starts, first, keys, size)
            kept = _kept(seed, site, threshold, head, (first + queries)[:, None], positions[None, :])
            bits |= (kept & ((1 << HEADS) - 1)) << HEADS * block
    low, high, again = tl.where(top < size, 0, size), size, True
    while low < high:
        own = _within(begins, queries, low, high)
        at, mask = _at(queries, token_stride, PAD), _there(own >= 0, D, PAD)
        out_at = _at(queries, heads * D, PAD)
        check = tl.zeros([QUERIES], tl.float32)
        for h in tl.range(0, tl.minimum(HEADS, heads - head)):
            q = tl.load(qkv + h * head_stride + at, mask=mask, other=0.0)
            highest, total = tl.full([QUERIES], float("-inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
            mixed = tl.zeros([QUERIES, PAD], tl.float32)
            for block in tl.range(0, key_blocks):
                keys = block * KEYS + tl.arange(0, KEYS)
                key_begins = _begins(starts, first, keys, size)
                others = _within(key_begins, keys, low, high)
                key_at, key_mask = _at(keys, token_stride, PAD), _there(others >= 0, D, PAD)
                k = tl.load(qkv + h * head_stride + part_stride + key_at, mask=key_mask, other=0.0)
                v = tl.load(qkv + h * head_stride + 2 * part_stride + key_at, mask=key_mask, other=0.0)
                same = own[:, None] == others[None, :]
                scores = tl.where(same, _dot(q, tl.trans(k)) * (scale * LOG2_E), float("-inf"))
                before, highest = highest, tl.maximum(highest, tl.max(scores, 1))
                base = _base(highest)
                p, shrink = tl.exp2(scores - base[:, None]), tl.exp2(before - base)
                total = total * shrink + tl.sum(p, 1)
                if DROPOUT:
                    bit = h
                    if HEADS > 1:
                        bit += HEADS * block
                    else:
                        positions = keys - key_begins
                        bits = _kept(seed, site, threshold, head, (first + queries)[:, None], positions[None, :])
                    p = tl.where((bits & (1 << bit)) != 0, p, 0.0)
                mixed = mixed * shrink[:, None] + _dot(p.to(v.dtype), v)
            tl.store(out + h * D + out_at, (mixed * (keep_scale / total)[:, None]).to(q.dtype), mask=mask)
            tl.store(lse + h * tokens + queries, _base(highest) + tl.log2(total), mask=own >= 0)
            check += tl.sum(mixed, 1)
        low, high = _next(low, high, check, again, starts, first, size)
        again = False


@triton.jit(do_not_specialize=["site", "threshold"])
def _backward_whole(
    qkv, grad_out, grad_qkv, cu_seqlens, tiles, starts, seed, site, threshold, keep_scale, scale, heads,
    token_stride, part_stride, head_stride, grad_token_stride, grad_head_stride,
    D: tl.constexpr, PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """A tile's gradients, from scores that lie transposed: [keys, queries]. Moves 7 elements a token and channel."""
    first, size = _tile(cu_seqlens, tiles, tl.program_id(0))
    head = tl.program_id(1) * HEADS
    rows = tl.arange(0, KEYS)
    begins = _begins(starts, first, rows, size)
    qkv += first.to(tl.int64) * token_stride + head * head_stride
    grad_out += first.to(tl.int64) * grad_token_stride + head * grad_head_stride
    grad_qkv += (first.to(tl.int64) * 3 * heads + head) * D
    bits = _no_bits(KEYS, QUERIES, qkv.dtype.element_ty)
    if DROPOUT:
        for block in tl.range(0, KEYS // QUERIES):
            queries = first + block * QUERIES + tl.arange(0, QUERIES)
            kept = _kept(seed, site, threshold, head, queries[None, :], (rows - begins)[:, None])
            bits |= (kept & ((1 << HEADS) - 1)) << HEADS * block
    low, high, again = 0, size, True
    while low < high:
        own = _within(begins, rows, low, high)
        at, mask = _at(rows, token_stride, PAD), _there(own >= 0, D, PAD)
        grad_at = _at(rows, 3 * heads * D, PAD)
        check = tl.zeros([QUERIES], tl.float32)
        for h in tl.range(0, tl.minimum(HEADS, heads - head)):
            k = tl.load(qkv + h * head_stride + part_stride + at, mask=mask, other=0.0)
            v = tl.load(qkv + h * head_stride + 2 * part_stride + at, mask=mask, other=0.0)
            dk, dv = tl.zeros([KEYS, PAD], tl.float32), tl.zeros([KEYS, PAD], tl.float32)
            for block in tl.range(0, KEYS // QUERIES):
                queries = block * QUERIES + tl.arange(0, QUERIES)
                others = _within(_begins(starts, first, queries, size), queries, low, high)
                query_at, query_mask = _at(queries, token_stride, PAD), _there(others >= 0, D, PAD)
                do_at = _at(queries, grad_token_stride, PAD)
                dq_at = _at(queries, 3 * heads * D, PAD)
                q = tl.load(qkv + h * head_stride + query_at, mask=query_mask, other=0.0)
                do = tl.load(grad_out + h * grad_head_stride + do_at, mask=query_mask, other=0.0)
                same = own[:, None] == others[None, :]
                scores = tl.where(same, _dot(k, tl.trans(q)) * (scale * LOG2_E), float("-inf"))
                dp = _dot(v, tl.trans(do))
                p = tl.exp2(scores - _base(tl.max(scores, 0))[None, :])
                p *= tl.where(others >= 0, 1 / tl.sum(p, 0), 0.0)[None, :]
                dropped = p
                if DROPOUT:
                    factor = tl.where((bits & (1 << (HEADS * block + h))) != 0, keep_scale, 0.0)
                    dropped, dp = p * factor, dp * factor
                ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q.dtype)
                dv += _dot(dropped.to(do.dtype), do)
                dk += _dot(ds, q)
                dq = _dot(tl.trans(ds), k)
                tl.store(grad_qkv + h * D + dq_at, (dq * scale).to(q.dtype), mask=query_mask)
                check += tl.sum(dq, 1)
            tl.store(grad_qkv + (heads + h) * D + grad_at, (dk * scale).to(k.dtype), mask=mask)
            tl.store(grad_qkv + (2 * heads + h) * D + grad_at, dv.to(v.dtype), mask=mask)
        low, high = _next(low, high, check, again, starts, first, size)
        again = False


@triton.jit(do_not_specialize=["site", "tokens", "threshold", "blocks"])
def _backward_queries(
    qkv, out, grad_out, lse, delta, grad_qkv, cu_seqlens, seed, site, threshold, keep_scale, scale,
    tokens, heads, blocks,
    token_stride, part_stride, head_stride, grad_token_stride, grad_head_stride,
    D: tl.constexpr, PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of a sequence's queries, and `delta` [H, N], the sums of grad_out * out."""
    first, size = _tile(cu_seqlens, None, tl.program_id(0) // blocks)
    top = tl.program_id(0) % blocks * QUERIES
    head = tl.program_id(1) * HEADS
    queries = top + tl.arange(0, QUERIES)
    inside = queries < size
    at, mask = _at(queries, token_stride, PAD), _there(inside, D, PAD)
    out_at = _at(queries, heads * D, PAD)
    do_at = _at(queries, grad_token_stride, PAD)
    dq_at = _at(queries, 3 * heads * D, PAD)
    qkv += first.to(tl.int64) * token_stride + head * head_stride
    out += (first.to(tl.int64) * heads + head) * D
    grad_out += first.to(tl.int64) * grad_token_stride + head * grad_head_stride
    grad_qkv += (first.to(tl.int64) * 3 * heads + head) * D
    statistics = head * tokens + first + queries
    key_blocks = tl.where(top < size, tl.cdiv(size, KEYS), 0)
    bits = _no_bits(QUERIES, KEYS, qkv.dtype.element_ty)
    if DROPOUT and HEADS > 1:
        for block in tl.range(0, key_blocks):
            keys = block * KEYS + tl.arange(0, KEYS)
            kept = _kept(seed, site, threshold, head, (first + queries)[:, None], keys[None, :])
            bits |= (kept & ((1 << HEADS) - 1)) << HEADS * block
    for h in tl.range(0, tl.where(top < size, tl.minimum(HEADS, heads - head), 0)):
        q = tl.load(qkv + h * head_stride + at, mask=mask, other=0.0)
        do = tl.load(grad_out + h * grad_head_stride + do_at, mask=mask, other=0.0)
        result = tl.load(out + h * D + out_at, mask=mask, other=0.0)
        normaliser = tl.load(lse + h * tokens + statistics, mask=inside, other=0.0)[:, None]
        mean = tl.sum(do.to(tl.float32) * result.to(tl.float32), 1)
        tl.store(delta + h * tokens + statistics, mean, mask=inside)
        dq = tl.zeros([QUERIES, PAD], tl.float32)
        for block in tl.range(0, key_blocks):
            keys = block * KEYS + tl.arange(0, KEYS)
            key_at, key_mask = _at(keys, token_stride, PAD), _there(keys < size, D, PAD)
            k = tl.load(qkv + h * head_stride + part_stride + key_at, mask=key_mask, other=0.0)
            v = tl.load(qkv + h * head_stride + 2 * part_stride + key_at, mask=key_mask, other=0.0)
            scores = tl.where((keys < size)[None, :], _dot(q, tl.trans(k)) * (scale * LOG2_E), float("-inf"))
            p, dp = tl.exp2(scores - normaliser), _dot(do, tl.trans(v))
            if DROPOUT:
                bit = h
                if HEADS > 1:
                    bit += HEADS * block
                else:
                    bits = _kept(seed, site, threshold, head, (first + queries)[:, None], keys[None, :])
                dp *= tl.where((bits & (1 << bit)) != 0, keep_scale, 0.0)
            dq += _dot((p * (dp - mean[:, None])).to(k.dtype), k)
        tl.store(grad_qkv + h * D + dq_at, (dq * scale).to(q.dtype), mask=mask)


@triton.jit(do_not_specialize=["site", "tokens", "threshold", "blocks"])
def _backward_keys(
    qkv, grad_out, lse, delta, grad_qkv, cu_seqlens, seed, site, threshold, keep_scale, scale, tokens, heads, blocks,
    token_stride, part_stride, head_stride, grad_token_stride, grad_head_stride,
    D: tl.constexpr, PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of a sequence's keys and values, from scores that lie transposed."""
    first, size = _tile(cu_seqlens, None, tl.program_id(0) // blocks)
    top = tl.program_id(0) % blocks * KEYS
    head = tl.program_id(1) * HEADS
    keys = top + tl.arange(0, KEYS)
    at, mask = _at(keys, token_stride, PAD), _there(keys < size, D, PAD)
    grad_at = _at(keys, 3 * heads * D, PAD)
    qkv += first.to(tl.int64) * token_stride + head * head_stride
    grad_out += first.to(tl.int64) * grad_token_stride + head * grad_head_stride
    grad_qkv += (first.to(tl.int64) * 3 * heads + head) * D
    query_blocks = tl.where(top < size, tl.cdiv(size, QUERIES), 0)
    bits = _no_bits(KEYS, QUERIES, qkv.dtype.element_ty)
    if DROPOUT and HEADS > 1:
        for block in tl.range(0, query_blocks):
            queries = first + block * QUERIES + tl.arange(0, QUERIES)
            kept = _kept(seed, site, threshold, head, queries[None, :], keys[:, None])
            bits |= (kept & ((1 << HEADS) - 1)) << HEADS * block
    for h in tl.range(0, tl.where(top < size, tl.minimum(HEADS, heads - head), 0)):
        k = tl.load(qkv + h * head_stride + part_stride + at, mask=mask, other=0.0)
        v = tl.load(qkv + h * head_stride + 2 * part_stride + at, mask=mask, other=0.0)
        dk, dv = tl.zeros([KEYS, PAD], tl.float32), tl.zeros([KEYS, PAD], tl.float32)
        for block in tl.range(0, query_blocks):
            queries = block * QUERIES + tl.arange(0, QUERIES)
            inside = queries < size
            query_at, query_mask = _at(queries, token_stride, PAD), _there(inside, D, PAD)
            do_at = _at(queries, grad_token_stride, PAD)
            statistics = (head + h) * tokens + first + queries
            q = tl.load(qkv + h * head_stride + query_at, mask=query_mask, other=0.0)
            do = tl.load(grad_out + h * grad_head_stride + do_at, mask=query_mask, other=0.0)
            normaliser = tl.load(lse + statistics, mask=inside, other=0.0)[None, :]
            mean = tl.load(delta + statistics, mask=inside, other=0.0)[None, :]
            scores = tl.where(inside[None, :], _dot(k, tl.trans(q)) * (scale * LOG2_E), float("-inf"))
            p, dp = tl.exp2(scores - normaliser), _dot(v, tl.trans(do))
            dropped = p
            if DROPOUT:
                bit = h
                if HEADS > 1:
                    bit += HEADS * block
                else:
                    bits = _kept(seed, site, threshold, head, (first + queries)[None, :], keys[:, None])
                factor = tl.where((bits & (1 << bit)) != 0, keep_scale, 0.0)
                dropped, dp = p * factor, dp * factor
            dv += _dot(dropped.to(do.dtype), do)
            dk += _dot((p * (dp - mean)).to(q.dtype), q)
        tl.store(grad_qkv + (heads + h) * D + grad_at, (dk * scale).to(k.dtype), mask=mask)
        tl.store(grad_qkv + (2 * heads + h) * D + grad_at, dv.to(v.dtype), mask=mask)


class Shape(NamedTuple):
    """Of a launch: rows in its blocks of queries and of keys, and Triton's options."""

    queries: int
    keys: int
    num_warps: int = 4
    num_stages: int = 1


class Shapes(NamedTuple):
    """Of all kernels. A tile's rows give `forward` and `backward`, if they have it: else blocks do its work."""

    forward: Mapping[int, Shape]
    backward: Mapping[int, Shape]
    blocks: Shape  # of the forward, for tiles
    long_blocks: Shape  # the same for sequences beyond them
    query_blocks: Shape  # of the backward
    key_blocks: Shape


# Chosen so that no register spills. Half precision, heads of up to 64 elements; then up to 128; then float32.
_HALF = Shapes(
    forward={32: Shape(32, 32, num_stages=2)},
    backward={32: Shape(32, 32)},
    blocks=Shape(64, 32, num_stages=2),
    long_blocks=Shape(64, 32, num_stages=2),
    query_blocks=Shape(64, 32),
    key_blocks=Shape(32, 64),
)
_HOPPER = Shapes(  # has matrix instructions for 64 rows, and takes them from shared memory
    forward={32: Shape(32, 32, num_stages=3), 64: Shape(64, 64, num_stages=2)},
    backward={32: Shape(32, 32), 64: Shape(32, 64), 128: Shape(32, 128, num_warps=8)},
    blocks=Shape(64, 64, num_stages=2),
    long_blocks=Shape(128, 64, num_warps=8, num_stages=2),
    query_blocks=Shape(128, 64, num_warps=8, num_stages=2),
    key_blocks=Shape(64, 128, num_warps=8),
)
_LARGE_HEADS = Shapes(
    forward={32: Shape(32, 32, num_stages=2)},
    backward={32: Shape(32, 32)},
    blocks=Shape(64, 32, num_warps=8, num_stages=2),
    long_blocks=Shape(64, 32, num_warps=8, num_stages=2),
    query_blocks=Shape(32, 32, num_stages=2),
    key_blocks=Shape(32, 32),
)
_FLOAT32 = Shapes(
    forward={32: Shape(32, 32)},
    backward={32: Shape(16, 32), 64: Shape(16, 64, num_warps=16)},
    blocks=Shape(32, 16),
    long_blocks=Shape(32, 16),
    query_blocks=Shape(16, 32),
    key_blocks=Shape(16, 32),
)


def _padded(head_dim: int) -> int:
    return max(32, triton.next_power_of_2(head_dim))


def _shapes(head_dim: int, dtype: torch.dtype, max_seqlen: int, capability: tuple[int, int]) -> Shapes:
    if dtype == torch.float32:
        return _FLOAT32
    if _padded(head_dim) > 64:
        return _LARGE_HEADS
    return _HOPPER if capability[0] == 9 and max_seqlen <= 512 else _HALF


def _arguments(
    qkv: Tensor, cu_seqlens: Tensor, dropout_p: float, seed: Tensor | None, site: int, scale: float
) -> dict[str, Any]:
    """What all kernels take; numbers of 32 bits as int32, so that they share one compilation."""
    tokens, _, heads, head_dim = qkv.shape
    threshold = reference.drop_threshold(dropout_p)
    return {
        "qkv": qkv,
        "cu_seqlens": cu_seqlens,
        "seed": seed,
        "threshold": threshold - (threshold >> 31 << 32),
        "site": site - (site >> 31 << 32),
        "keep_scale": 1 / (1 - dropout_p),
        "scale": scale,
        "tokens": tokens,
        "heads": heads,
        "token_stride": qkv.stride(0),
        "part_stride": qkv.stride(1),
        "head_stride": qkv.stride(2),
        "D": head_dim,
        "PAD": _padded(head_dim),
        "DROPOUT": seed is not None,
    }


class Launch(NamedTuple):
    kernel: Any
    shape: Shape
    programs: int  # of a tile, for each group of heads
    blocks: int  # that a program goes through

    def together(self, dropout: bool) -> int:
        """Heads of a program: as many as share random words, if 32 bits hold what dropout keeps in all the blocks."""
        return next((heads for heads in (4, 2) if heads * self.blocks <= 32), 1) if dropout else 1

    def __call__(self, tiles: int, arguments: dict[str, Any]) -> None:
        together = self.together(arguments["DROPOUT"])
        blocks = {"blocks": self.programs, "QUERIES": self.shape.queries, "KEYS": self.shape.keys, "HEADS": together}
        given = arguments | blocks
        self.kernel[(tiles * self.programs, triton.cdiv(arguments["heads"], together))](
            **{name: given[name] for name in self.kernel.arg_names},
            num_warps=self.shape.num_warps,
            num_stages=self.shape.num_stages,
            enable_fp_fusion=True,
        )


def _forward(shapes: Shapes, max_seqlen: int) -> Launch:
    rows = tile_rows(max_seqlen)
    if rows is not None and rows in shapes.forward:
        return Launch(_forward_whole, shapes.forward[rows], 1, 1)
    shape, longest = (shapes.long_blocks, max_seqlen) if rows is None else (shapes.blocks, rows)
    return Launch(_forward_blocks, shape, triton.cdiv(longest, shape.queries), triton.cdiv(longest, shape.keys))


def _backward(shapes: Shapes, max_seqlen: int) -> list[Launch]:
    """One launch if it takes whole tiles. Else two, in this order, that take sequences."""
    rows = tile_rows(max_seqlen)
    if rows is not None and rows in shapes.backward:
        shape = shapes.backward[rows]
        return [Launch(_backward_whole, shape, 1, shape.keys // shape.queries)]
    first, then = shapes.query_blocks, shapes.key_blocks
    return [
        Launch(_backward_queries, first, triton.cdiv(max_seqlen, first.queries), triton.cdiv(max_seqlen, first.keys)),
        Launch(_backward_keys, then, triton.cdiv(max_seqlen, then.keys), triton.cdiv(max_seqlen, then.queries)),
    ]


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)  # else it is interpreted


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    scale: float,
    tiles: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result [N, H, d], and lse [H, N], which holds something where the backward goes over blocks."""
    tokens, _, heads, head_dim = qkv.shape
    out, lse = qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(heads, tokens, dtype=torch.float32)
    if tile_rows(max_seqlen) is None:
        tiles = starts = None
    arguments = _arguments(qkv, cu_seqlens, dropout_p, seed, site, scale)
    arguments |= {"tiles": tiles, "starts": starts, "out": out, "lse": lse}
    shapes = _shapes(head_dim, qkv.dtype, max_seqlen, _capability(qkv.device))
    with torch.cuda.device_of(qkv):
        _forward(shapes, max_seqlen)(cu_seqlens.shape[0] - 1 if tiles is None else tiles.shape[0], arguments)
    return out, lse


def attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    scale: float,
    tiles: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Tensor:
    """The gradient of qkv, contiguous. The elements of grad_out's heads lie next to each other."""
    launches = _backward(_shapes(qkv.shape[3], qkv.dtype, max_seqlen, _capability(qkv.device)), max_seqlen)
    if len(launches) > 1:
        tiles = starts = None
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    arguments = _arguments(qkv, cu_seqlens, dropout_p, seed, site, scale)
    arguments |= {"tiles": tiles, "starts": starts, "out": out, "lse": lse, "delta": torch.empty_like(lse)}
    arguments |= {"grad_out": grad_out, "grad_token_stride": grad_out.stride(0), "grad_head_stride": grad_out.stride(1)}
    arguments |= {"grad_qkv": grad_qkv}
    with torch.cuda.device_of(qkv):
        for launch in launches:
            launch(cu_seqlens.shape[0] - 1 if tiles is None else tiles.shape[0], arguments)
    return grad_qkv


def compilations() -> Iterator[Compilation]:
    """bf16 with heads of 64 elements in full; of the rest, what dropout and tiles make largest."""
    found: dict[tuple[Any, torch.dtype, int, Shape, int, bool, bool], tuple[int, ...]] = {}
    for dtype, head_dim in [
        *((torch.bfloat16, head_dim) for head_dim in (64, 32, 40, 128)),
        *((torch.float16, 64), (torch.float32, 32), (torch.float32, 64), (torch.float32, 128)),
    ]:
        full = (dtype, head_dim) == (torch.bfloat16, 64)
        for architecture, dropout in itertools.product(ARCHITECTURES, (True, False) if full else (True,)):
            for max_seqlen in (32, 64, 128, 256, 512, 1024):
                shapes = _shapes(head_dim, dtype, max_seqlen, divmod(architecture, 10))
                for launch in (_forward(shapes, max_seqlen), *_backward(shapes, max_seqlen)):
                    tiled = tile_rows(max_seqlen) is not None and "tiles" in launch.kernel.arg_names
                    for table in (True, False) if tiled and full else (tiled,):
                        heads = launch.together(dropout)
                        key = (launch.kernel, dtype, head_dim, launch.shape, heads, dropout, table)
                        if architecture not in found.get(key, ()):
                            found[key] = (*found.get(key, ()), architecture)
    for key, architectures in found.items():
        yield _compilation(*key, architectures)


def _spills(dtype: torch.dtype, head_dim: int) -> int:
    """Bytes a thread that the compiler may spill: none for BERT's heads in half precision, for which tiles were chosen.

    Elsewhere it does in some configurations, by a few registers, and in float32 with a head dimension of 128 by many.
    """
    if dtype != torch.float32:
        return 0 if head_dim == 64 else 32
    return 400 if head_dim == 128 else 32


def _compilation(
    kernel: Any,
    dtype: torch.dtype,
    head_dim: int,
    shape: Shape,
    heads: int,
    dropout: bool,
    table: bool,
    architectures: tuple[int, ...],
) -> Compilation:
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {
        **dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), element),
        **dict.fromkeys(("lse", "delta"), "*fp32"),
        **dict.fromkeys(("cu_seqlens", *(("tiles", "starts") if table else ())), "*i32"),
        **dict.fromkeys(("keep_scale", "scale"), "fp32"),
        **({"seed": "*i64"} if dropout else {}),
    }
    constants: dict[str, Any] = {"D": head_dim, "PAD": _padded(head_dim), "HEADS": heads, "DROPOUT": dropout}
    constants |= {"QUERIES": shape.queries, "KEYS": shape.keys, "tiles": None, "starts": None, "seed": None}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name in types or name not in constants}
    strides = [name for name in signature if name.endswith("stride") and head_dim % 16 == 0]
    return Compilation(
        f"attention{kernel.fn.__name__.replace('_', ' ')}, {element[1:]}, head dim {head_dim}, "
        f"{shape.queries} queries, {shape.keys} keys, {heads} heads, {shape.num_warps} warps, {shape.num_stages} stages"
        f"{', dropout' if dropout else ''}{', tiles' if table else ''}",
        kernel,
        signature,
        {name: constants[name] for name in kernel.arg_names if name not in signature},
        (*(name for name, kind in signature.items() if kind.startswith("*")), *strides),
        shape.num_warps,
        shape.num_stages,
        architectures=architectures,
        spills=_spills(dtype, head_dim),
    )
