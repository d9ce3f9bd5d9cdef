"""Kernels of attention within each sequence of a packed stream, forward and backward.

A program takes one tile of rows and, one after another, up to 4 heads, whose random words come from the same Philox
counters: bit h of an integer says whether head h of the 4 keeps a probability. Sequences of up to 128 tokens share
tiles (`tiles`, `starts`: kernels/attention_plan.py makes them); without that table, and for longer ones, a tile is a
sequence. Up to 64 rows, all of a tile's scores are there at once; beyond, the softmax runs over blocks of keys
(Milakov and Gimelshein 2018, Dao et al. 2022).

Inside a program rows count from the tile's first, and scores are in units of log(2), for exp2 is what the hardware
has. Over blocks, the forward leaves `lse` [H, N], log2 of the sum of 2**score, for the backward. Masks and addresses
are computed again for each head (`disable_licm`): there are no registers to keep them in.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from . import philox

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
    """The offset that scores are relative to: the highest score, or 0 for rows without scores."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _no_bits(ROWS: tl.constexpr, COLUMNS: tl.constexpr, like):
    """Zeros, as a product: the compiler then keeps them, and what is added to them, where it keeps scores."""
    return _dot(tl.zeros([ROWS, 16], like), tl.zeros([16, COLUMNS], like)).to(tl.int32)


@triton.jit
def _kept_one(key_position, query_row, head, stream_id, seed, least):
    w0, w1, w2, w3 = philox.words(seed, key_position, query_row, head // 4, stream_id)
    low = (w0 >= least).to(tl.int32) | (w1 >= least).to(tl.int32) << 1
    return (low | (w2 >= least).to(tl.int32) << 2 | (w3 >= least).to(tl.int32) << 3) >> head % 4


@triton.jit
def _kept(seed, stream_id, threshold, head, query_rows, key_positions):
    """Bit h: whether head + h keeps the probability; h goes up to the last head of the same Philox counter."""
    seed, query_rows = philox.seeded(seed, query_rows)
    least = tl.cast(threshold, tl.uint32)
    if INTERPRETED:
        return _kept_one(key_positions, query_rows, head, stream_id, seed, least)
    else:  # element after element: step after step of all elements would keep all their states in registers
        return tl.map_elementwise(_kept_one, key_positions, query_rows, head, stream_id, seed, least)


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
    """`begins`, with -2 for rows outside [low, high)."""
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


@triton.jit(do_not_specialize=["stream_id", "threshold"])
def forward_whole(
    qkv, out, cu_seqlens, tiles, starts, seed, stream_id, threshold, keep_scale, scale, heads,
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
        bits = _kept(seed, stream_id, threshold, head, (first + rows)[:, None], (rows - begins)[None, :])
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


@triton.jit(do_not_specialize=["stream_id", "tokens", "threshold", "blocks"])
def forward_blocks(
    qkv, out, lse, cu_seqlens, tiles, starts, seed, stream_id, threshold, keep_scale, scale, tokens, heads,
    blocks, token_stride, part_stride, head_stride,
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
            kept = _kept(seed, stream_id, threshold, head, (first + queries)[:, None], positions[None, :])
            bits |= (kept & ((1 << HEADS) - 1)) << HEADS * block
    low, high, again = tl.where(top < size, 0, size), size, True
    while low < high:
        own = _within(begins, queries, low, high)
        at, mask = _at(queries, token_stride, PAD), _there(own >= 0, D, PAD)
        out_at = _at(queries, heads * D, PAD)
        check = tl.zeros([QUERIES], tl.float32)
        for h in tl.range(0, tl.minimum(HEADS, heads - head), disable_licm=True):
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
                # Where a tile is a sequence, rows outside it see it too, and are not stored.
                same = (others >= 0)[None, :] if starts is None else own[:, None] == others[None, :]
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
                        bits = _kept(seed, stream_id, threshold, head, (first + queries)[:, None], positions[None, :])
                    p = tl.where((bits & (1 << bit)) != 0, p, 0.0)
                mixed = mixed * shrink[:, None] + _dot(p.to(v.dtype), v)
            tl.store(out + h * D + out_at, (mixed * (keep_scale / total)[:, None]).to(q.dtype), mask=mask)
            tl.store(lse + h * tokens + queries, _base(highest) + tl.log2(total), mask=own >= 0)
            check += tl.sum(mixed, 1)
        low, high = _next(low, high, check, again, starts, first, size)
        again = False


@triton.jit(do_not_specialize=["stream_id", "threshold"])
def backward_whole(
    qkv, grad_out, grad_qkv, cu_seqlens, tiles, starts, seed, stream_id, threshold, keep_scale, scale, heads,
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
            kept = _kept(seed, stream_id, threshold, head, queries[None, :], (rows - begins)[:, None])
            bits |= (kept & ((1 << HEADS) - 1)) << HEADS * block
    low, high, again = 0, size, True
    while low < high:
        own = _within(begins, rows, low, high)
        at, mask = _at(rows, token_stride, PAD), _there(own >= 0, D, PAD)
        grad_at = _at(rows, 3 * heads * D, PAD)
        check = tl.zeros([QUERIES], tl.float32)
        for h in tl.range(0, tl.minimum(HEADS, heads - head), disable_licm=True):
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


@triton.jit(do_not_specialize=["stream_id", "tokens", "threshold", "blocks"])
def backward_queries(
    qkv, out, grad_out, lse, delta, grad_qkv, cu_seqlens, seed, stream_id, threshold, keep_scale, scale,
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
            kept = _kept(seed, stream_id, threshold, head, (first + queries)[:, None], keys[None, :])
            bits |= (kept & ((1 << HEADS) - 1)) << HEADS * block
    for h in tl.range(0, tl.where(top < size, tl.minimum(HEADS, heads - head), 0), disable_licm=True):
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
                    bits = _kept(seed, stream_id, threshold, head, (first + queries)[:, None], keys[None, :])
                dp *= tl.where((bits & (1 << bit)) != 0, keep_scale, 0.0)
            dq += _dot((p * (dp - mean[:, None])).to(k.dtype), k)
        tl.store(grad_qkv + h * D + dq_at, (dq * scale).to(q.dtype), mask=mask)


@triton.jit(do_not_specialize=["stream_id", "tokens", "threshold", "blocks"])
def backward_keys(
    qkv, grad_out, lse, delta, grad_qkv, cu_seqlens, seed, stream_id, threshold, keep_scale, scale, tokens, heads,
    blocks, token_stride, part_stride, head_stride, grad_token_stride, grad_head_stride,
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
            kept = _kept(seed, stream_id, threshold, head, queries[None, :], keys[:, None])
            bits |= (kept & ((1 << HEADS) - 1)) << HEADS * block
    for h in tl.range(0, tl.where(top < size, tl.minimum(HEADS, heads - head), 0), disable_licm=True):
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
                    bits = _kept(seed, stream_id, threshold, head, (first + queries)[None, :], keys[:, None])
                factor = tl.where((bits & (1 << bit)) != 0, keep_scale, 0.0)
                dropped, dp = p * factor, dp * factor
            dv += _dot(dropped.to(do.dtype), do)
            dk += _dot((p * (dp - mean)).to(q.dtype), q)
        tl.store(grad_qkv + (heads + h) * D + grad_at, (dk * scale).to(k.dtype), mask=mask)
        tl.store(grad_qkv + (2 * heads + h) * D + grad_at, dv.to(v.dtype), mask=mask)
