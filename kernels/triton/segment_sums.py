"""Sums over the rows of each task, for parameters that several tasks share: all tasks in one launch, in a fixed order.

A kernel's programs each take a chunk of rows of one task and leave a row of partial sums; `sum_chunks` adds those of
each task. Chunks and results do not depend on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNKS, BLOCK, WARPS = 128, 32, 4  # of a tile of partial sums: 8 loads of 16 bytes in flight for every thread


def arguments(bounds: Sequence[int]) -> tuple[int, ...]:
    """The bounds of the tasks' rows as kernels take them: as odd numbers from 3.

    Triton compiles a kernel anew for an integer that is 1 or divisible by 16; in a tuple this cannot be disabled.
    """
    return tuple(2 * bound + 3 for bound in bounds)


def signature(tasks: int) -> tuple[str, ...]:
    """The type of `arguments`."""
    return ("i32",) * (tasks + 1)


def chunk_rows(bounds: Sequence[int], tile: int, programs: int) -> int:
    """Rows of a chunk: whole tiles, and about as many chunks as programs."""
    return tile * triton.cdiv(bounds[-1], tile * programs)


def chunks(bounds: Sequence[int], rows: int) -> int:
    """How many chunks of up to `rows` rows the tasks have."""
    return sum(triton.cdiv(end - start, rows) for start, end in pairwise(bounds))


@triton.jit
def bound(bounds, index: tl.constexpr):
    return (bounds[index] - 3) // 2


@triton.jit
def chunk(bounds, index, rows):
    """The first row of a chunk of up to `rows` rows, and where its task's rows end."""
    first = 0  # chunk of the task
    start = 0
    end = 0
    for task in tl.static_range(len(bounds) - 1):
        low, high = bound(bounds, task), bound(bounds, task + 1)
        start = tl.where(index >= first, low + (index - first) * rows, start)
        end = tl.where(index >= first, high, end)
        first += tl.cdiv(high - low, rows)
    return start, tl.minimum(end, start + rows)


@triton.jit(do_not_specialize=["rows"])
def sum_chunks_kernel(partials, out, bounds, rows, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    mine = tl.program_id(1)
    first = 0
    last = 0
    for task in tl.static_range(len(bounds) - 1):
        count = tl.cdiv(bound(bounds, task + 1) - bound(bounds, task), rows)
        first += tl.where(task < mine, count, 0)
        last += tl.where(task <= mine, count, 0)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([CHUNKS, BLOCK], tl.float32)
    while first < last:
        row = first + tl.arange(0, CHUNKS)[:, None]
        mask = (row < last) & (column < COLUMNS)[None, :]
        total += tl.load(partials + row.to(tl.int64) * COLUMNS + column[None, :], mask=mask, other=0.0)
        first += CHUNKS
    tl.store(out + mine * COLUMNS + column, tl.sum(total, 0), mask=column < COLUMNS)


def sum_chunks(partials: Tensor, bounds: Sequence[int], rows: int) -> Tensor:
    """For each of T tasks [T, columns] the sum of its chunks' partial sums [chunks, columns], float32."""
    tasks, columns = len(bounds) - 1, partials.shape[1]
    out = torch.empty(tasks, columns, dtype=torch.float32, device=partials.device)
    sum_chunks_kernel[(triton.cdiv(columns, BLOCK), tasks)](
        partials, out, arguments(bounds), rows, columns, CHUNKS, BLOCK, num_warps=WARPS, enable_fp_fusion=True
    )
    return out
