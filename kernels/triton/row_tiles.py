"""Tiles of an activation [N, D] in registers: a few rows in a tuple of parts, [ROWS, BLOCK] of float32 each.

A lane holds 8 elements of each part, 16 bytes in half precision. Up to 768 columns a row has one warp: sums over it
need no shared memory, and of BERT's 768, three parts of 256, no lane is idle. Beyond rows and columns, tiles are 0.
"""

# ruff: noqa: RUF005  Triton adds tuples, but unpacks none
# mypy: disable-error-code="assignment, misc"
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from . import philox

LARGEST = 4096  # columns of a row in registers
OPTIONS = {"enable_fp_fusion": True}
# For sums over rows beside whole rows. Left alone, ptxas spills a few registers to get by with 128 or 168.
ROOMY = {**OPTIONS, "maxnreg": 255}


class Shape(NamedTuple):
    """Of a tile: `rows` rows of an activation with so many columns, in `parts` parts of `block` columns."""

    columns: int
    rows: int
    block: int
    parts: int

    @property
    def warps(self) -> int:
        return max(4, self.block // 256)


def whole(columns: int) -> Shape:
    """The shape of tiles of whole rows: up to three parts."""
    block = max(min(256, max(16, triton.next_power_of_2(columns))), triton.next_power_of_2(triton.cdiv(columns, 3)))
    return Shape(columns, max(1, 1024 // block), block, triton.cdiv(columns, block))


def band(columns: int, rows: int) -> Shape:
    """The shape of tiles of up to 256 columns, for what is done to each element by itself."""
    return whole(min(columns, 256))._replace(columns=columns, rows=rows)


def launch(shape: Shape, options: Mapping[str, Any] = OPTIONS) -> dict[str, Any]:
    return {"num_warps": shape.warps, **options}


def dropout_arguments(p: float, seed: Tensor | None, stream_id: int) -> dict[str, Any]:
    """What kernels take for dropout; none happens where the threshold is 0."""
    threshold = drop_threshold(p)
    return {"seed": seed if threshold else None, "scale": 1 / (1 - p), "stream_id": stream_id, "THRESHOLD": threshold}


@triton.jit
def offsets(row, end, part, SHAPE: tl.constexpr):
    """Where a part's elements are, counted from the tile's first row, and which of them exist."""
    below = tl.arange(0, SHAPE.rows)[:, None]
    column = part * SHAPE.block + tl.arange(0, SHAPE.block)[None, :]
    mask = row + below < end
    if SHAPE.columns % SHAPE.block != 0:
        mask = mask & (column < SHAPE.columns)
    return below * SHAPE.columns + column, mask


@triton.jit
def load(x, row, end, SHAPE: tl.constexpr, first=0):
    """The rows of x from `row` to `end`, as far as the tile goes; its parts are those from `first`."""
    x += row.to(tl.int64) * SHAPE.columns
    tile = ()
    for part in tl.static_range(tl.constexpr(SHAPE.parts)):
        offset, mask = offsets(row, end, first + part, SHAPE)
        tile = tile + (tl.load(x + offset, mask=mask, other=0.0).to(tl.float32),)
    return tile


@triton.jit
def store(x, tile, row, end, SHAPE: tl.constexpr, first=0):
    x += row.to(tl.int64) * SHAPE.columns
    for part in tl.static_range(len(tile)):
        offset, mask = offsets(row, end, first + part, SHAPE)
        tl.store(x + offset, tile[part].to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(x, SHAPE: tl.constexpr, first=0):
    """A parameter [D], once for each row: every lane loads what it needs, and nothing is exchanged."""
    vector = ()
    for part in tl.static_range(tl.constexpr(SHAPE.parts)):
        column = (first + part) * SHAPE.block + tl.arange(0, SHAPE.block)[None, :]
        column += tl.full([SHAPE.rows, 1], 0, tl.int32)
        vector = vector + (tl.load(x + column, mask=column < SHAPE.columns, other=0.0),)
    return vector


@triton.jit
def zeros(SHAPE: tl.constexpr):
    tile = ()
    for _ in tl.static_range(tl.constexpr(SHAPE.parts)):
        tile = tile + (tl.full([SHAPE.rows, SHAPE.block], 0.0, tl.float32),)
    return tile


@triton.jit
def add(one, other):
    total = ()
    for part in tl.static_range(len(one)):
        total = total + (one[part] + other[part],)
    return total


@triton.jit
def store_sums(partials, tile, SHAPE: tl.constexpr, first=0):
    """The sums of a tile's columns, [D]."""
    for part in tl.static_range(len(tile)):
        column = (first + part) * SHAPE.block + tl.arange(0, SHAPE.block)
        tl.store(partials + column, tl.sum(tile[part], 0), mask=column < SHAPE.columns)


@triton.jit
def sum_of_rows(tile):
    """[ROWS, 1]"""
    total = tile[0]
    for part in tl.static_range(1, len(tile)):
        total += tile[part]
    return tl.sum(total, 1)[:, None]


@triton.jit
def keep(seed, stream_id, row, THRESHOLD: tl.constexpr, SHAPE: tl.constexpr, numbers=None, end=0):
    """Which elements of a tile dropout keeps; nothing where it keeps all.

    Element (row, column) has word column % 4 of counter (column / 4, row, 0, stream_id); philox.py numbers rows. Given
    `numbers`, those of the rows up to `end`, they take the place of consecutive ones.
    """
    kept = ()
    if THRESHOLD > 0:
        rows = row + tl.arange(0, SHAPE.rows)[:, None]
        if numbers is not None:
            rows = tl.load(numbers + rows, mask=rows < end, other=0)
        key, number = philox.seeded(seed, rows)
        for part in tl.static_range(tl.constexpr(SHAPE.parts)):
            group = part * (SHAPE.block // 4) + tl.arange(0, SHAPE.block // 4)[None, :]
            w0, w1, w2, w3 = philox.words(key, group, number, 0, stream_id)
            word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            kept = kept + (word >= THRESHOLD,)
    return kept


@triton.jit
def dropout(tile, kept, scale):
    """Zero what is not kept and scale the rest; what is not a number stays so."""
    dropped = ()
    for part in tl.static_range(len(tile)):
        if len(kept) > 0:
            dropped = dropped + (tile[part] * tl.where(kept[part], scale, 0.0),)
        else:
            dropped = dropped + (tile[part],)
    return dropped
