"""Dropout by itself. It is linear and its own backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows
from .ahead import Compilation


@triton.jit(do_not_specialize=["end", "stream_id"])
def _dropout(x, y, end, seed, scale, stream_id, THRESHOLD: tl.constexpr, SHAPE: tl.constexpr):
    row = tl.program_id(0) * SHAPE.rows
    kept = rows.keep(seed, stream_id, row, THRESHOLD, SHAPE)
    rows.store(y, rows.dropout(rows.load(x, row, end, SHAPE), kept, scale), row, end, SHAPE)


def dropout(x: Tensor, p: float, seed: Tensor, stream_id: int) -> Tensor:
    y, shape = torch.empty_like(x), rows.whole(x.shape[1])
    grid = (triton.cdiv(x.shape[0], shape.rows),)
    _dropout[grid](x, y, x.shape[0], **rows.dropout_arguments(p, seed, stream_id), SHAPE=shape, **rows.launch(shape))
    return y


def compilations() -> Iterator[Compilation]:
    for columns, dtype, p in rows.cases():
        if p:
            yield rows.compilation("dropout", _dropout, rows.whole(columns), dtype, ("x", "y"), {"end": "i32"}, p=p)
