"""Dropout by itself. It is linear and its own backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import row_tiles


@triton.jit(do_not_specialize=["end", "stream_id"])
def dropout_kernel(x, y, end, seed, scale, stream_id, THRESHOLD: tl.constexpr, SHAPE: tl.constexpr):
    row = tl.program_id(0) * SHAPE.rows
    kept = row_tiles.keep(seed, stream_id, row, THRESHOLD, SHAPE)
    row_tiles.store(y, row_tiles.dropout(row_tiles.load(x, row, end, SHAPE), kept, scale), row, end, SHAPE)


def dropout(x: Tensor, p: float, seed: Tensor, stream_id: int) -> Tensor:
    y, shape = torch.empty_like(x), row_tiles.whole(x.shape[1])
    grid = (triton.cdiv(x.shape[0], shape.rows),)
    dropout_kernel[grid](
        x, y, x.shape[0], **row_tiles.dropout_arguments(p, seed, stream_id), SHAPE=shape, **row_tiles.launch(shape)
    )
    return y
