"""Bias and GELU, forward and backward.

Per element in bfloat16 the forward reads or writes 4 bytes and the backward 6: 8192 x 3072 are 101 and 151 MB, at least
30 and 45 us at 3.35 TB/s. Instructions are as scarce: with the library's error function the forward issues 38 per
element, 31 us of an H100. So half precisions use polynomials.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import row_tiles, segment_sums

ROWS = 8  # of a tile of 256 columns: 16 elements a lane
PROGRAMS = 640  # of a backward: what an H100 takes at once, five on each of its 132 multiprocessors

# Half precisions. With a = |z|, the tails Phi(-a) and Phi(-a) - a phi(a) are p(a)^16 and (0.7518 - a) p(a)^8 with the
# polynomials p of csrc/cpu/gelu.cpp, which states their errors; they reach 0 at 8.5.


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
def _derivative_tail(a):
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
def _derivative(z, EXACT: tl.constexpr):
    if EXACT:
        derivative = _cdf(z) + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327)
    else:
        tail = _derivative_tail(tl.abs(z))
        derivative = tl.where(z < 0.0, tail, 1.0 - tail)
    return derivative


@triton.jit
def _rows_and_columns(SHAPE: tl.constexpr):
    """Which rows and which columns are this program's."""
    BANDS: tl.constexpr = (SHAPE.columns + SHAPE.block - 1) // SHAPE.block
    return tl.program_id(0) // BANDS, tl.program_id(0) % BANDS


@triton.jit(do_not_specialize=["end"])
def forward_kernel(x, bias, y, end, SHAPE: tl.constexpr):
    index, band = _rows_and_columns(SHAPE)
    row = index * SHAPE.rows
    z = row_tiles.load(x, row, end, SHAPE, band)[0] + row_tiles.load_vector(bias, SHAPE, band)[0]
    row_tiles.store(y, (_gelu(z, x.dtype.element_ty == tl.float32),), row, end, SHAPE, band)


@triton.jit(do_not_specialize=["chunk"])
def backward_kernel(d_y, x, bias, d_x, partials, bounds, chunk, SHAPE: tl.constexpr):
    index, band = _rows_and_columns(SHAPE)
    start, end = segment_sums.chunk(bounds, index, chunk)
    shift = row_tiles.load_vector(bias, SHAPE, band)[0]
    (d_bias,) = row_tiles.zeros(SHAPE)
    row = start
    while row < end:
        derivative = _derivative(row_tiles.load(x, row, end, SHAPE, band)[0] + shift, x.dtype.element_ty == tl.float32)
        d_z = row_tiles.load(d_y, row, end, SHAPE, band)[0] * derivative
        row_tiles.store(d_x, (d_z,), row, end, SHAPE, band)
        d_bias += d_z
        row += SHAPE.rows
    row_tiles.store_sums(partials + index.to(tl.int64) * SHAPE.columns, (d_bias,), SHAPE, band)


def forward(x: Tensor, bias: Tensor) -> Tensor:
    y, shape = torch.empty_like(x), row_tiles.band(x.shape[1], ROWS)
    grid = (triton.cdiv(x.shape[0], shape.rows) * triton.cdiv(x.shape[1], shape.block),)
    forward_kernel[grid](x, bias, y, x.shape[0], SHAPE=shape, **row_tiles.launch(shape))
    return y


def backward(d_y: Tensor, x: Tensor, bias: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The gradients of x and of T biases, float32 [T, D]."""
    d_x, shape = torch.empty_like(x), row_tiles.band(x.shape[1], ROWS)
    bands = triton.cdiv(x.shape[1], shape.block)
    chunk = segment_sums.chunk_rows(bounds, shape.rows, triton.cdiv(PROGRAMS, bands))
    partials = bias.new_empty(segment_sums.chunks(bounds, chunk), x.shape[1])
    grid = (len(partials) * bands,)
    backward_kernel[grid](
        d_y, x, bias, d_x, partials, segment_sums.arguments(bounds), chunk, SHAPE=shape, **row_tiles.launch(shape)
    )
    return d_x, segment_sums.sum_chunks(partials, bounds, chunk)
