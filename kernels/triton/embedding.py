"""The embedding block: the sum of three table rows, layer norm and dropout, forward and backward.

The backward writes dense gradients of the tables for every task: zeros, but for a few thousand rows. Those zeros bound
it: for 3 tasks and BERT-base's tables 286 MB, 85 us at 3.35 TB/s, while 8192 tokens' gradients are 25 MB in float32.

No two programs add to one row, so that results repeat to the bit. The rows' numbers are sorted, those of all tables and
tasks at once; each program sums the runs of equal numbers in a piece of PIECE entries, and where runs go on over
pieces, a second launch adds up their parts in order.
"""

# ruff: noqa: RUF005  Triton adds tuples, but unpacks none
# mypy: disable-error-code="assignment, misc"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layer_norm, row_tiles, segment_sums

PIECE = 16  # entries: so many loads of 16 bytes in flight for every lane
SPAN, SPAN_WARPS = 256, 2  # columns of a program that sums pieces
PIECES = 32  # of a long run, loaded at once
TOKENS = 1024  # of a program that numbers rows


@triton.jit
def _gather(table, ids, SIZE: tl.constexpr, row, end, SHAPE: tl.constexpr):
    """The rows of a table of SIZE rows that ids `row` to `end` name, or 0, and [rows, 1] whether the table has them."""
    below = row + tl.arange(0, SHAPE.rows)[:, None]
    index = tl.load(ids + below, mask=below < end, other=0)
    known = (index >= 0) & (index < SIZE)
    offset = index * SHAPE.columns
    tile = ()
    for part in tl.static_range(tl.constexpr(SHAPE.parts)):
        column = part * SHAPE.block + tl.arange(0, SHAPE.block)[None, :]
        mask = (below < end) & known & (column < SHAPE.columns)
        tile = tile + (tl.load(table + offset + column, mask=mask, other=0.0).to(tl.float32),)
    return tile, known


@triton.jit
def _total(
    token_ids,
    token_type_ids,
    position_ids,
    word_table,
    token_type_table,
    position_table,
    SIZES: tl.constexpr,
    row,
    end,
    SHAPE: tl.constexpr,
):
    """The sums of three rows each, and [rows, 1] whether all tables have theirs."""
    words, known_word = _gather(word_table, token_ids, SIZES[0], row, end, SHAPE)
    types, known_type = _gather(token_type_table, token_type_ids, SIZES[1], row, end, SHAPE)
    positions, known_position = _gather(position_table, position_ids, SIZES[2], row, end, SHAPE)
    return row_tiles.add(row_tiles.add(words, types), positions), known_word & known_type & known_position


@triton.jit(do_not_specialize=["end", "stream_id"])
def forward_kernel(
    token_ids,
    token_type_ids,
    position_ids,
    word_table,
    token_type_table,
    position_table,
    weight,
    bias,
    y,
    mean_rstd,
    end,
    eps,
    seed,
    scale,
    stream_id,
    SIZES: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SHAPE: tl.constexpr,
):
    row = tl.program_id(0) * SHAPE.rows
    total, known = _total(
        token_ids, token_type_ids, position_ids, word_table, token_type_table, position_table, SIZES, row, end, SHAPE
    )
    mean, rstd = layer_norm.mean_and_rstd(total, eps, SHAPE)
    mean = tl.where(known, mean, float("nan"))
    layer_norm.store_mean_rstd(mean_rstd, mean, rstd, row, end, SHAPE)
    normed = layer_norm.affine(layer_norm.normalise(total, mean, rstd), weight, bias, SHAPE)
    kept = row_tiles.keep(seed, stream_id, row, THRESHOLD, SHAPE)
    row_tiles.store(y, row_tiles.dropout(normed, kept, scale), row, end, SHAPE)


@triton.jit(do_not_specialize=["chunk", "stream_id"])
def backward_kernel(
    d_y,
    token_ids,
    token_type_ids,
    position_ids,
    word_table,
    token_type_table,
    position_table,
    weight,
    mean_rstd,
    d_total,
    partials,
    bounds,
    chunk,
    seed,
    scale,
    stream_id,
    SIZES: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SHAPE: tl.constexpr,
):
    start, end = segment_sums.chunk(bounds, tl.program_id(0), chunk)
    d_weight, d_bias = row_tiles.zeros(SHAPE), row_tiles.zeros(SHAPE)
    row = start
    while row < end:
        mean, rstd = layer_norm.load_mean_rstd(mean_rstd, row, end, SHAPE)
        total, _ = _total(
            token_ids,
            token_type_ids,
            position_ids,
            word_table,
            token_type_table,
            position_table,
            SIZES,
            row,
            end,
            SHAPE,
        )
        normed = layer_norm.normalise(total, mean, rstd)
        kept = row_tiles.keep(seed, stream_id, row, THRESHOLD, SHAPE)
        d_normed = row_tiles.dropout(row_tiles.load(d_y, row, end, SHAPE), kept, scale)
        d_tile, d_weight, d_bias = layer_norm.gradient(d_normed, normed, rstd, weight, d_weight, d_bias, SHAPE)
        row_tiles.store(d_total, d_tile, row, end, SHAPE)
        row += SHAPE.rows
    layer_norm.store_sums(partials, d_weight, d_bias, SHAPE)


@triton.jit(do_not_specialize=["count"])
def number_rows_kernel(
    token_ids, token_type_ids, position_ids, keys, bounds, count, SIZES: tl.constexpr, TOKENS: tl.constexpr
):
    """keys [3, N]: the row, of the gradients of all tables and tasks one below the other, that gets a token's; -1 where
    its table has no such row."""
    ids = (token_ids, token_type_ids, position_ids)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    task = tl.full([TOKENS], 0, tl.int64)
    for other in tl.static_range(1, len(bounds) - 1):
        task += (token >= segment_sums.bound(bounds, other)).to(tl.int64)
    first = 0
    for i in tl.static_range(3):
        index = tl.load(ids[i] + token, mask=token < count, other=0)
        row = tl.where((index >= 0) & (index < SIZES[i]), first + task * SIZES[i] + index, -1)
        tl.store(keys + i * count + token, row.to(tl.int32), mask=token < count)
        first += (len(bounds) - 1) * SIZES[i]


@triton.jit
def _key(keys, entry, entries):
    """The entry's row; -1 where there is no entry."""
    return tl.load(keys + entry, mask=(entry >= 0) & (entry < entries), other=-1)


@triton.jit
def _store_if(condition, pointers, value, column, COLUMNS: tl.constexpr):
    tl.store(pointers, value, mask=column < tl.where(condition, COLUMNS, 0))


@triton.jit(do_not_specialize=["entries", "tokens"])
def sum_pieces_kernel(
    keys, order, d_total, out, parts, entries, tokens, COLUMNS: tl.constexpr, PIECE: tl.constexpr, SPAN: tl.constexpr
):
    """out: the sums of runs inside of pieces. parts [pieces, 2, D]: of a run that began before, and of one that begins
    here and goes on."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    exists = column < COLUMNS
    key, value = (), ()
    for i in tl.static_range(PIECE):
        entry = piece * PIECE + i
        token = tl.load(order + entry, mask=entry < entries, other=0).to(tl.int32) % tokens
        key = key + (_key(keys, entry, entries),)
        value = value + (tl.load(d_total + token.to(tl.int64) * COLUMNS + column, mask=exists, other=0.0),)
    before, after = _key(keys, piece * PIECE - 1, entries), _key(keys, (piece + 1) * PIECE, entries)
    key = key + (after,)
    total = value[0]
    for i in tl.static_range(PIECE):
        if i > 0:
            total = tl.where(key[i] == key[i - 1], total, 0.0) + value[i]
        ends = (key[i] >= 0) & (key[i] != key[i + 1])
        row = out + key[i].to(tl.int64) * COLUMNS
        _store_if(ends & (key[i] != before), row + column, total, column, COLUMNS)
        _store_if(ends & (key[i] == before), parts + piece * 2 * COLUMNS + column, total, column, COLUMNS)
    goes_on, slot = (after >= 0) & (key[PIECE - 1] == after), piece * 2 + (key[PIECE - 1] != before).to(tl.int64)
    _store_if(goes_on, parts + slot * COLUMNS + column, total, column, COLUMNS)


@triton.jit(do_not_specialize=["entries"])
def join_pieces_kernel(
    keys, out, parts, entries, COLUMNS: tl.constexpr, PIECE: tl.constexpr, SPAN: tl.constexpr, PIECES: tl.constexpr
):
    """The sum of the run that begins in a piece and goes on."""
    piece = tl.program_id(0).to(tl.int64)
    first, key = _key(keys, piece * PIECE - 1, entries), _key(keys, (piece + 1) * PIECE - 1, entries)
    piece += 1
    if (key >= 0) & (key != first) & (key == _key(keys, piece * PIECE, entries)):
        column = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
        exists = column < COLUMNS
        total = tl.load(parts + (piece * 2 - 1) * COLUMNS + column, mask=exists, other=0.0)
        while _key(keys, piece * PIECE, entries) == key:
            several = piece + tl.arange(0, PIECES)[:, None]
            mask = (_key(keys, several * PIECE, entries) == key) & exists[None, :]
            total += tl.sum(tl.load(parts + several * 2 * COLUMNS + column[None, :], mask=mask, other=0.0), 0)
            piece += PIECES
        tl.store(out + key.to(tl.int64) * COLUMNS + column, total, mask=exists)


def forward(
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    stream_id: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The output, and each token's mean and 1 / standard deviation, float32 [N, 2].

    A token with an id outside its table gets NaN: the ids cannot be checked on the host without waiting for the GPU.
    """
    tokens, shape = len(ids[0]), row_tiles.whole(len(weight))
    y, mean_rstd = weight.new_empty(tokens, len(weight), dtype=dtype), weight.new_empty(tokens, 2)
    drop = row_tiles.dropout_arguments(p, seed, stream_id)
    grid = (triton.cdiv(tokens, shape.rows),)
    constants = {"SIZES": tuple(map(len, tables)), "SHAPE": shape}
    forward_kernel[grid](
        *ids, *tables, weight, bias, y, mean_rstd, tokens, eps, **drop, **constants, **row_tiles.launch(shape)
    )
    return y, mean_rstd


def backward(
    d_y: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor,
    mean_rstd: Tensor,
    bounds: Sequence[int],
    p: float,
    seed: Tensor | None,
    stream_id: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of the tables, one below the other: T of the words, T of the token types, T of the positions, all
    float32; and of T weights and biases, float32 [T, 2, D]. A token with an id outside its table adds to none of them.
    """
    shape = row_tiles.whole(len(weight))
    chunk = segment_sums.chunk_rows(bounds, shape.rows, layer_norm.PROGRAMS)
    d_total = torch.empty_like(d_y, dtype=torch.float32)
    partials = weight.new_empty(segment_sums.chunks(bounds, chunk), 2, len(weight))
    drop = row_tiles.dropout_arguments(p, seed, stream_id)
    tensors = (d_y, *ids, *tables, weight, mean_rstd, d_total, partials)
    sizes = tuple(map(len, tables))
    constants = {"SIZES": sizes, "SHAPE": shape, **row_tiles.launch(shape, row_tiles.ROOMY)}
    backward_kernel[(len(partials),)](*tensors, segment_sums.arguments(bounds), chunk, **drop, **constants)
    d_tables = weight.new_zeros((len(bounds) - 1) * sum(sizes), len(weight))
    _add_rows(d_total, _numbers(ids, bounds, sizes), d_tables)
    return d_tables, layer_norm.sum_up(partials, bounds, chunk)


def _numbers(ids: Sequence[Tensor], bounds: Sequence[int], sizes: tuple[int, ...]) -> Tensor:
    tokens = len(ids[0])
    keys = torch.empty(3 * tokens, dtype=torch.int32, device=ids[0].device)
    number_rows_kernel[(triton.cdiv(tokens, TOKENS),)](
        *ids, keys, segment_sums.arguments(bounds), tokens, sizes, TOKENS, num_warps=4, **row_tiles.OPTIONS
    )
    return keys


def _add_rows(values: Tensor, keys: Tensor, out: Tensor) -> None:
    """out[keys[i]] += values[i % N], in the order of i; values [N, D], and out holds zeros."""
    (tokens, columns), entries = values.shape, len(keys)
    keys, order = torch.sort(keys, stable=True)
    pieces = triton.cdiv(entries, PIECE)
    parts = values.new_empty(pieces, 2, columns)
    grid, how = (pieces, triton.cdiv(columns, SPAN)), {"num_warps": SPAN_WARPS, **row_tiles.OPTIONS}
    sum_pieces_kernel[grid](keys, order, values, out, parts, entries, tokens, columns, PIECE, SPAN, **how)
    join_pieces_kernel[grid](keys, out, parts, entries, columns, PIECE, SPAN, PIECES, **how)
