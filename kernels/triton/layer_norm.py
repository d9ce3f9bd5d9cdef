"""Dropout, residual and layer norm, forward and backward.

Per token of BERT-base in bfloat16 the forward reads or writes 3 rows of 1.5 KB and the backward 5 of them (4 without
dropout), and memory bounds both: 8192 tokens are 38 and 63 MB, at least 11 and 19 us at 3.35 TB/s.
"""

# ruff: noqa: RUF005  Triton adds tuples, but unpacks none
# mypy: disable-error-code="assignment, misc"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import row_tiles, segment_sums

PROGRAMS = 256  # of a backward: what an H100 takes at once, two on each of its 132 multiprocessors


# What the embedding block's layer norm does too -------------------------------------------------------------------


@triton.jit
def mean_and_rstd(tile, eps, SHAPE: tl.constexpr):
    """Of each row the mean and 1 / sqrt(variance + eps), [ROWS, 1]."""
    mean = row_tiles.sum_of_rows(tile) / SHAPE.columns
    squares = ()
    for part in tl.static_range(len(tile)):
        centred = tile[part] - mean
        if SHAPE.columns % SHAPE.block != 0:
            column = part * SHAPE.block + tl.arange(0, SHAPE.block)[None, :]
            centred = tl.where(column < SHAPE.columns, centred, 0.0)
        squares = squares + (centred * centred,)
    return mean, tl.rsqrt(row_tiles.sum_of_rows(squares) / SHAPE.columns + eps)


@triton.jit
def store_mean_rstd(mean_rstd, mean, rstd, row, end, SHAPE: tl.constexpr):
    row += tl.arange(0, SHAPE.rows)[:, None]
    lane = tl.arange(0, SHAPE.block // 8)[None, :]  # as many as a row has: two of them store what all of them know
    tl.store(mean_rstd + row * 2 + lane, tl.where(lane == 0, mean, rstd), mask=(row < end) & (lane < 2))


@triton.jit
def load_mean_rstd(mean_rstd, row, end, SHAPE: tl.constexpr):
    row += tl.arange(0, SHAPE.rows)[:, None]
    mean = tl.load(mean_rstd + row * 2, mask=row < end, other=0.0)
    return mean, tl.load(mean_rstd + row * 2 + 1, mask=row < end, other=0.0)


@triton.jit
def normalise(tile, mean, rstd):
    normed = ()
    for part in tl.static_range(len(tile)):
        normed = normed + ((tile[part] - mean) * rstd,)
    return normed


@triton.jit
def affine(tile, weight, bias, SHAPE: tl.constexpr):
    w, b = row_tiles.load_vector(weight, SHAPE), row_tiles.load_vector(bias, SHAPE)
    y = ()
    for part in tl.static_range(len(tile)):
        y = y + (tile[part] * w[part] + b[part],)
    return y


@triton.jit
def gradient(d_y, normed, rstd, weight, d_weight, d_bias, SHAPE: tl.constexpr):
    """The gradient of what was normed, and the sums d_weight and d_bias with these rows added to them."""
    w = row_tiles.load_vector(weight, SHAPE)
    d_normed, products, weight_terms = (), (), ()
    for part in tl.static_range(len(d_y)):
        d_normed = d_normed + (d_y[part] * w[part],)
        products = products + (d_normed[part] * normed[part],)
        weight_terms = weight_terms + (d_y[part] * normed[part],)
    mean_d_normed = row_tiles.sum_of_rows(d_normed) / SHAPE.columns
    mean_product = row_tiles.sum_of_rows(products) / SHAPE.columns
    d_tile = ()
    for part in tl.static_range(len(d_y)):
        d_tile = d_tile + ((d_normed[part] - mean_d_normed - normed[part] * mean_product) * rstd,)
    return d_tile, row_tiles.add(d_weight, weight_terms), row_tiles.add(d_bias, d_y)


@triton.jit
def store_sums(partials, d_weight, d_bias, SHAPE: tl.constexpr):
    """This program's partial sums: [2, D] of [programs, 2, D]."""
    partials += tl.program_id(0).to(tl.int64) * (2 * SHAPE.columns)
    row_tiles.store_sums(partials, d_weight, SHAPE)
    row_tiles.store_sums(partials + SHAPE.columns, d_bias, SHAPE)


def sum_up(partials: Tensor, bounds: Sequence[int], chunk: int) -> Tensor:
    """The gradients of weight and bias, [T, 2, D], of partial sums [programs, 2, D]."""
    return segment_sums.sum_chunks(partials.flatten(1), bounds, chunk).view(-1, *partials.shape[1:])


# The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _total(x, residual, kept, scale, row, end, SHAPE: tl.constexpr):
    return row_tiles.add(
        row_tiles.load(residual, row, end, SHAPE), row_tiles.dropout(row_tiles.load(x, row, end, SHAPE), kept, scale)
    )


@triton.jit(do_not_specialize=["end", "stream_id"])
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    mean_rstd,
    end,
    eps,
    seed,
    scale,
    stream_id,
    numbers,
    THRESHOLD: tl.constexpr,
    SHAPE: tl.constexpr,
):
    row = tl.program_id(0) * SHAPE.rows
    kept = row_tiles.keep(seed, stream_id, row, THRESHOLD, SHAPE, numbers, end)
    total = _total(x, residual, kept, scale, row, end, SHAPE)
    mean, rstd = mean_and_rstd(total, eps, SHAPE)
    store_mean_rstd(mean_rstd, mean, rstd, row, end, SHAPE)
    row_tiles.store(y, affine(normalise(total, mean, rstd), weight, bias, SHAPE), row, end, SHAPE)


@triton.jit(do_not_specialize=["chunk", "stream_id"])
def backward_kernel(
    d_y,
    x,
    residual,
    weight,
    mean_rstd,
    d_x,
    d_residual,
    partials,
    bounds,
    chunk,
    seed,
    scale,
    stream_id,
    numbers,
    THRESHOLD: tl.constexpr,
    SHAPE: tl.constexpr,
):
    start, end = segment_sums.chunk(bounds, tl.program_id(0), chunk)
    d_weight, d_bias = row_tiles.zeros(SHAPE), row_tiles.zeros(SHAPE)
    row = start
    while row < end:
        kept = row_tiles.keep(seed, stream_id, row, THRESHOLD, SHAPE, numbers, end)
        total = _total(x, residual, kept, scale, row, end, SHAPE)
        mean, rstd = load_mean_rstd(mean_rstd, row, end, SHAPE)
        d_output, normed = row_tiles.load(d_y, row, end, SHAPE), normalise(total, mean, rstd)
        d_total, d_weight, d_bias = gradient(d_output, normed, rstd, weight, d_weight, d_bias, SHAPE)
        row_tiles.store(d_residual, d_total, row, end, SHAPE)
        if THRESHOLD > 0:
            again = row_tiles.keep(
                seed, stream_id, row, THRESHOLD, SHAPE, numbers, end
            )  # to keep it takes 40 registers
            row_tiles.store(d_x, row_tiles.dropout(d_total, again, scale), row, end, SHAPE)
        row += SHAPE.rows
    store_sums(partials, d_weight, d_bias, SHAPE)


def _dropout_arguments(p: float, seed: Tensor | None, stream_id: int, rows: Tensor | None) -> dict[str, Any]:
    drop = row_tiles.dropout_arguments(p, seed, stream_id)
    return {**drop, "numbers": rows if drop["THRESHOLD"] else None}


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    stream_id: int,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and each row's mean and 1 / standard deviation, float32 [N, 2]."""
    y, mean_rstd = torch.empty_like(x), torch.empty(x.shape[0], 2, dtype=torch.float32, device=x.device)
    shape = row_tiles.whole(x.shape[1])
    drop = _dropout_arguments(p, seed, stream_id, dropout_rows)
    grid = (triton.cdiv(x.shape[0], shape.rows),)
    forward_kernel[grid](
        x, residual, weight, bias, y, mean_rstd, x.shape[0], eps, **drop, SHAPE=shape, **row_tiles.launch(shape)
    )
    return y, mean_rstd


def backward(
    d_y: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean_rstd: Tensor,
    bounds: Sequence[int],
    p: float,
    seed: Tensor | None,
    stream_id: int,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (empty without dropout, for it is the residual's), of residual, and of T weights and biases,
    float32 [T, 2, D]."""
    shape, drop = row_tiles.whole(x.shape[1]), _dropout_arguments(p, seed, stream_id, dropout_rows)
    d_x = torch.empty_like(x) if drop["THRESHOLD"] else x.new_empty(0)
    d_residual = torch.empty_like(x)
    chunk = segment_sums.chunk_rows(bounds, shape.rows, PROGRAMS)
    partials = weight.new_empty(segment_sums.chunks(bounds, chunk), 2, x.shape[1])
    tensors = (d_y, x, residual, weight, mean_rstd, d_x, d_residual, partials)
    backward_kernel[(len(partials),)](
        *tensors, segment_sums.arguments(bounds), chunk, **drop, SHAPE=shape, **row_tiles.launch(shape, row_tiles.ROOMY)
    )
    return d_x, d_residual, sum_up(partials, bounds, chunk)
