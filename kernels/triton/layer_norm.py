"""Dropout, residual and layer norm, forward and backward.

Per token of BERT-base in bfloat16 the forward reads or writes 3 rows of 1.5 KB and the backward 5 of them (4 without
dropout), and memory bounds both: 8192 tokens are 38 and 63 MB, at least 11 and 19 us at 3.35 TB/s.
"""

# ruff: noqa: RUF005  Triton adds tuples, but unpacks none
# mypy: disable-error-code="assignment, misc"
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows, tasks
from .ahead import Compilation

PROGRAMS = 256  # of a backward: what an H100 takes at once, two on each of its 132 multiprocessors


# What the embedding block's layer norm does too -------------------------------------------------------------------


@triton.jit
def moments_of(tile, eps, SHAPE: tl.constexpr):
    """Of each row the mean and 1 / sqrt(variance + eps), [ROWS, 1]."""
    mean = rows.sum_of_rows(tile) / SHAPE.columns
    squares = ()
    for part in tl.static_range(len(tile)):
        centred = tile[part] - mean
        if SHAPE.columns % SHAPE.block != 0:
            column = part * SHAPE.block + tl.arange(0, SHAPE.block)[None, :]
            centred = tl.where(column < SHAPE.columns, centred, 0.0)
        squares = squares + (centred * centred,)
    return mean, tl.rsqrt(rows.sum_of_rows(squares) / SHAPE.columns + eps)


@triton.jit
def store_moments(moments, mean, rstd, row, end, SHAPE: tl.constexpr):
    row += tl.arange(0, SHAPE.rows)[:, None]
    lane = tl.arange(0, SHAPE.block // 8)[None, :]  # as many as a row has: two of them store what all of them know
    tl.store(moments + row * 2 + lane, tl.where(lane == 0, mean, rstd), mask=(row < end) & (lane < 2))


@triton.jit
def load_moments(moments, row, end, SHAPE: tl.constexpr):
    row += tl.arange(0, SHAPE.rows)[:, None]
    mean = tl.load(moments + row * 2, mask=row < end, other=0.0)
    return mean, tl.load(moments + row * 2 + 1, mask=row < end, other=0.0)


@triton.jit
def normalise(tile, mean, rstd):
    normed = ()
    for part in tl.static_range(len(tile)):
        normed = normed + ((tile[part] - mean) * rstd,)
    return normed


@triton.jit
def affine(tile, weight, bias, SHAPE: tl.constexpr):
    w, b = rows.load_vector(weight, SHAPE), rows.load_vector(bias, SHAPE)
    y = ()
    for part in tl.static_range(len(tile)):
        y = y + (tile[part] * w[part] + b[part],)
    return y


@triton.jit
def gradient(d_y, normed, rstd, weight, d_weight, d_bias, SHAPE: tl.constexpr):
    """The gradient of what was normed, and the sums d_weight and d_bias with these rows added to them."""
    w = rows.load_vector(weight, SHAPE)
    slope, along, weight_terms = (), (), ()
    for part in tl.static_range(len(d_y)):
        slope = slope + (d_y[part] * w[part],)
        along = along + (slope[part] * normed[part],)
        weight_terms = weight_terms + (d_y[part] * normed[part],)
    mean_slope = rows.sum_of_rows(slope) / SHAPE.columns
    mean_along = rows.sum_of_rows(along) / SHAPE.columns
    d_tile = ()
    for part in tl.static_range(len(d_y)):
        d_tile = d_tile + ((slope[part] - mean_slope - normed[part] * mean_along) * rstd,)
    return d_tile, rows.add(d_weight, weight_terms), rows.add(d_bias, d_y)


@triton.jit
def store_sums(partials, d_weight, d_bias, SHAPE: tl.constexpr):
    """This program's partial sums: [2, D] of [programs, 2, D]."""
    partials += tl.program_id(0).to(tl.int64) * (2 * SHAPE.columns)
    rows.store_sums(partials, d_weight, SHAPE)
    rows.store_sums(partials + SHAPE.columns, d_bias, SHAPE)


def sum_up(partials: Tensor, bounds: Sequence[int], chunk: int) -> Tensor:
    """The gradients of weight and bias, [T, 2, D], of partial sums [programs, 2, D]."""
    return tasks.sum_chunks(partials.flatten(1), bounds, chunk).view(-1, *partials.shape[1:])


# The kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _total(x, residual, kept, scale, row, end, SHAPE: tl.constexpr):
    return rows.add(rows.load(residual, row, end, SHAPE), rows.dropout(rows.load(x, row, end, SHAPE), kept, scale))


@triton.jit(do_not_specialize=["end", "stream_id"])
def _forward(
    x,
    residual,
    weight,
    bias,
    y,
    moments,
    end,
    eps,
    seed,
    scale,
    stream_id,
    THRESHOLD: tl.constexpr,
    SHAPE: tl.constexpr,
):
    row = tl.program_id(0) * SHAPE.rows
    kept = rows.keep(seed, stream_id, row, THRESHOLD, SHAPE)
    total = _total(x, residual, kept, scale, row, end, SHAPE)
    mean, rstd = moments_of(total, eps, SHAPE)
    store_moments(moments, mean, rstd, row, end, SHAPE)
    rows.store(y, affine(normalise(total, mean, rstd), weight, bias, SHAPE), row, end, SHAPE)


@triton.jit(do_not_specialize=["chunk", "stream_id"])
def _backward(
    d_y,
    x,
    residual,
    weight,
    moments,
    d_x,
    d_residual,
    partials,
    bounds,
    chunk,
    seed,
    scale,
    stream_id,
    THRESHOLD: tl.constexpr,
    SHAPE: tl.constexpr,
):
    start, end = tasks.chunk(bounds, tl.program_id(0), chunk)
    d_weight, d_bias = rows.zeros(SHAPE), rows.zeros(SHAPE)
    row = start
    while row < end:
        total = _total(x, residual, rows.keep(seed, stream_id, row, THRESHOLD, SHAPE), scale, row, end, SHAPE)
        mean, rstd = load_moments(moments, row, end, SHAPE)
        slope, normed = rows.load(d_y, row, end, SHAPE), normalise(total, mean, rstd)
        d_total, d_weight, d_bias = gradient(slope, normed, rstd, weight, d_weight, d_bias, SHAPE)
        rows.store(d_residual, d_total, row, end, SHAPE)
        if THRESHOLD > 0:
            kept = rows.keep(seed, stream_id, row, THRESHOLD, SHAPE)  # drawn anew: to keep it takes 40 registers
            rows.store(d_x, rows.dropout(d_total, kept, scale), row, end, SHAPE)
        row += SHAPE.rows
    store_sums(partials, d_weight, d_bias, SHAPE)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: Tensor | None, stream_id: int
) -> tuple[Tensor, Tensor]:
    """The output, and each row's mean and 1 / standard deviation, float32 [N, 2]."""
    y, moments = torch.empty_like(x), torch.empty(x.shape[0], 2, dtype=torch.float32, device=x.device)
    shape = rows.whole(x.shape[1])
    drop = rows.dropout_arguments(p, seed, stream_id)
    grid = (triton.cdiv(x.shape[0], shape.rows),)
    _forward[grid](x, residual, weight, bias, y, moments, x.shape[0], eps, **drop, SHAPE=shape, **rows.launch(shape))
    return y, moments


def backward(
    d_y: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    moments: Tensor,
    bounds: Sequence[int],
    p: float,
    seed: Tensor | None,
    stream_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (empty without dropout, for it is the residual's), of residual, and of T weights and biases,
    float32 [T, 2, D]."""
    shape, drop = rows.whole(x.shape[1]), rows.dropout_arguments(p, seed, stream_id)
    d_x = torch.empty_like(x) if drop["THRESHOLD"] else x.new_empty(0)
    d_residual = torch.empty_like(x)
    chunk = tasks.chunk_rows(bounds, shape.rows, PROGRAMS)
    partials = weight.new_empty(tasks.chunks(bounds, chunk), 2, x.shape[1])
    tensors = (d_y, x, residual, weight, moments, d_x, d_residual, partials)
    _backward[(len(partials),)](
        *tensors, tasks.arguments(bounds), chunk, **drop, SHAPE=shape, **rows.launch(shape, rows.ROOMY)
    )
    return d_x, d_residual, sum_up(partials, bounds, chunk)


def compilations() -> Iterator[Compilation]:
    vectors = dict.fromkeys(("weight", "bias", "moments"), "*fp32")
    sums = dict.fromkeys(("weight", "moments", "partials"), "*fp32")
    limits: dict[str, Any] = {"bounds": tasks.signature(3), "chunk": "i32"}
    for columns, dtype, p in rows.cases():
        case = rows.whole(columns), dtype
        halves, others = ("x", "residual", "y"), {**vectors, "end": "i32", "eps": "fp32"}
        yield rows.compilation("layer norm forward", _forward, *case, halves, others, p=p)
        halves, others = ("d_y", "d_x", *halves[:2], "d_residual"), {**sums, **limits}
        yield rows.compilation("layer norm backward", _backward, *case, halves, others, p=p, options=rows.ROOMY)
