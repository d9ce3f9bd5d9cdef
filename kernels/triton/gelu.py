"""Bias and GELU, forward and backward.

Per element in bfloat16 the forward reads or writes 4 bytes and the backward 6: 8192 x 3072 are 101 and 151 MB, at least
30 and 45 us at 3.35 TB/s. Instructions are as scarce: with the library's error function the forward issues 38 per
element, 31 us of an H100. So half precisions have polynomials of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows, tasks
from .ahead import Compilation

ROWS = 8  # of a tile of 256 columns: 16 elements a lane
PROGRAMS = 640  # of a backward: what an H100 takes at once, five on each of its 132 multiprocessors

# Half precisions. With a = |z|, the tails Phi(-a) and Phi(-a) - a phi(a) are p(a)^16 and (0.7518 - a) p(a)^8 with the
# polynomials p of csrc/cpu/gelu.cpp, which says how near they are; they reach 0 at 8.5.


@triton.jit
def _tail(a):
    near = tl.minimum(a, 8.5)
    p = near * -4.498466e-05 + 0.0006828838
    p = p * near - 0.0013553224
    p = p * near - 0.0178273
    p = p * near - 0.047759116
    p = p * near + 0.9576097
    p = p * p
    p = p * p
    p = p * p
    return p * p


@triton.jit
def _slope_tail(a):
    near = tl.minimum(a, 8.5)
    p = near * -2.8178755e-07 + 7.4734103e-06
    p = p * near - 6.0409253e-05
    p = p * near - 2.947824e-05
    p = p * near + 0.0023341672
    p = p * near - 0.002853526
    p = p * near - 0.04571106
    p = p * near - 0.031536475
    p = p * near + 0.9502959
    p = p * p
    p = p * p
    return (0.75179154 - a) * p * p


@triton.jit
def _cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu(z, EXACT: tl.constexpr):
    if EXACT:
        y = z * _cdf(z)
    else:
        tail = _tail(tl.abs(z))
        y = z * tl.where(z < 0.0, tail, 1.0 - tail)
    return y


@triton.jit
def _slope(z, EXACT: tl.constexpr):
    if EXACT:
        slope = _cdf(z) + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327)
    else:
        tail = _slope_tail(tl.abs(z))
        slope = tl.where(z < 0.0, tail, 1.0 - tail)
    return slope


@triton.jit
def _place(SHAPE: tl.constexpr):
    """Which rows and which columns are this program's."""
    BANDS: tl.constexpr = (SHAPE.columns + SHAPE.block - 1) // SHAPE.block
    return tl.program_id(0) // BANDS, tl.program_id(0) % BANDS


@triton.jit(do_not_specialize=["end"])
def _forward(x, bias, y, end, SHAPE: tl.constexpr):
    index, band = _place(SHAPE)
    row = index * SHAPE.rows
    z = rows.load(x, row, end, SHAPE, band)[0] + rows.load_vector(bias, SHAPE, band)[0]
    rows.store(y, (_gelu(z, x.dtype.element_ty == tl.float32),), row, end, SHAPE, band)


@triton.jit(do_not_specialize=["chunk"])
def _backward(d_y, x, bias, d_x, partials, bounds, chunk, SHAPE: tl.constexpr):
    index, band = _place(SHAPE)
    start, end = tasks.chunk(bounds, index, chunk)
    shift = rows.load_vector(bias, SHAPE, band)[0]
    (d_bias,) = rows.zeros(SHAPE)
    row = start
    while row < end:
        slope = _slope(rows.load(x, row, end, SHAPE, band)[0] + shift, x.dtype.element_ty == tl.float32)
        d_z = rows.load(d_y, row, end, SHAPE, band)[0] * slope
        rows.store(d_x, (d_z,), row, end, SHAPE, band)
        d_bias += d_z
        row += SHAPE.rows
    rows.store_sums(partials + index.to(tl.int64) * SHAPE.columns, (d_bias,), SHAPE, band)


def forward(x: Tensor, bias: Tensor) -> Tensor:
    y, shape = torch.empty_like(x), rows.band(x.shape[1], ROWS)
    grid = (triton.cdiv(x.shape[0], shape.rows) * triton.cdiv(x.shape[1], shape.block),)
    _forward[grid](x, bias, y, x.shape[0], SHAPE=shape, **rows.launch(shape))
    return y


def backward(d_y: Tensor, x: Tensor, bias: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The gradients of x and of T biases, float32 [T, D]."""
    d_x, shape = torch.empty_like(x), rows.band(x.shape[1], ROWS)
    bands = triton.cdiv(x.shape[1], shape.block)
    chunk = tasks.chunk_rows(bounds, shape.rows, triton.cdiv(PROGRAMS, bands))
    partials = bias.new_empty(tasks.chunks(bounds, chunk), x.shape[1])
    grid = (len(partials) * bands,)
    _backward[grid](d_y, x, bias, d_x, partials, tasks.arguments(bounds), chunk, SHAPE=shape, **rows.launch(shape))
    return d_x, tasks.sum_chunks(partials, bounds, chunk)


def compilations() -> Iterator[Compilation]:
    cases = [(columns, dtype) for columns in (1536, 3072, 70) for dtype in (torch.float32, torch.bfloat16)]
    vectors = {"bias": "*fp32", "partials": "*fp32"}
    for columns, dtype in [*cases, (3072, torch.float16)]:
        shape, limits = rows.band(columns, ROWS), {"bounds": tasks.signature(3), "chunk": "i32"}
        yield rows.compilation("GELU forward", _forward, shape, dtype, ("x", "y"), {"bias": "*fp32", "end": "i32"})
        yield rows.compilation("GELU backward", _backward, shape, dtype, ("d_y", "x", "d_x"), {**vectors, **limits})
