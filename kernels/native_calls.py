"""Calls of native code: addresses, sizes and dtype codes for csrc/kernels.h, threads on CPUs, streams on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import reference
from .attention_plan import AttentionProblem
from .native import library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.float16: 3}  # csrc/kernels.h's DType


def run(name: str, device: torch.device, *arguments: Any) -> None:
    """Run a native function on all threads, or on a CUDA device its counterpart, on the current stream."""
    if device.type == "cpu":
        getattr(library(), name)(*arguments, torch.get_num_threads())
        return
    with torch.cuda.device(device):
        getattr(library(), f"cuda_{name}")(*arguments, torch.cuda.current_stream().cuda_stream)


def shown_as(op: str) -> AbstractContextManager[object]:
    """A block that torch's profiler shows as it shows calls of a custom op."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"minbert::{op}")
    return nullcontext()


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def activation(x: Tensor) -> tuple[int, int, int]:
    """Rows, columns and dtype of x [N, D]."""
    return x.shape[0], x.shape[1], DTYPE_CODES[x.dtype]


def dropout(
    p: float, seed: Tensor | None, stream_id: int, first_row: int = 0, rows: Tensor | None = None
) -> tuple[int, int, int, float, int, int]:
    """The seed's address, threshold, stream id, the scale of kept elements, and which rows of the op these are.

    A threshold of 0 drops nothing.

    Args:
        first_row: the op's row that is row 0 here.
        rows: int32, the numbers of the op's rows where they are not consecutive: row i has that of first_row + i.
    """
    numbered = (first_row, 0) if rows is None else (0, rows.data_ptr() + first_row * rows.element_size())
    return address(seed), reference.drop_threshold(p), stream_id, 1 / (1 - p), *numbered


def attention_problem(problem: AttentionProblem) -> Any:
    """The native AttentionProblem; a problem's keys and values alone stand for its queries too."""
    qkv, drop = problem.qkv, dropout(problem.dropout_p, problem.seed, problem.stream_id)
    seed, threshold, stream_id, keep_scale, *_ = drop
    return library().AttentionProblem(
        DTYPE_CODES[qkv.dtype],
        problem.cu_seqlens.data_ptr(),
        problem.cu_seqlens.shape[0] - 1,
        qkv.shape[0],
        problem.max_seqlen,
        qkv.shape[2],
        qkv.shape[3],
        problem.scale,
        seed,
        threshold,
        stream_id,
        keep_scale,
    )


def row_scratch(rows: int, columns: int) -> Tensor:
    """Scratch memory for an activation [rows, columns]."""
    return torch.empty(library().row_scratch(rows, columns), dtype=torch.float32)


def sparse_parts(
    rows: Sequence[Sequence[Tensor | None]], columns: Sequence[int]
) -> tuple[list[Tensor | None], list[Tensor | None], list[int]]:
    """Some columns of the task gradients as `task_gradients` takes them: its `grads`, `rows` and `tables`."""
    grads = [row[k] for row in rows for k in columns]
    if all(grad is None or grad.layout == torch.strided for grad in grads):
        return grads, [], []
    sparse = [grad is not None and grad.layout != torch.strided for grad in grads]
    parts = list(zip(grads, sparse, strict=True))
    tables = [any_of(grads[k :: len(columns)]) for k in range(len(columns))]
    return (
        [grad.values().contiguous() if of_rows else grad for grad, of_rows in parts],  # type: ignore[union-attr]
        [grad.indices()[0].contiguous() if of_rows else None for grad, of_rows in parts],  # type: ignore[union-attr]
        [0 if table.layout == torch.strided else table.shape[0] for table in tables],
    )


def any_of(grads: Sequence[Tensor | None]) -> Tensor:
    """The first tensor of a list that holds one."""
    return next(grad for grad in grads if grad is not None)


def by_part(columns: Sequence[int], parts: Sequence[int] | None, count: int) -> tuple[Sequence[int], list[int] | None]:
    """The columns of the task gradients, those of part 0 of the model first, and the first of each part among them.

    Args:
        columns: indices of columns, in order.
        parts: for each column of the gradients its part; None for one part, which changes nothing.
        count: of the parts, G.

    Returns:
        the indices, in order within each part; and the first position of each part, and the number of columns [G + 1].
    """
    if parts is None:
        return columns, None
    sizes = [0] * count
    for k in columns:
        sizes[parts[k]] += 1
    return sorted(columns, key=parts.__getitem__), [0, *accumulate(sizes)]


def chunks(sizes: Sequence[int]) -> int:
    """The number of chunks in which native code reads tensors of these sizes."""
    return sum(-(-size // library().CHUNK) for size in sizes)


def task_gradients(
    grads: Sequence[Tensor | None],
    tasks: int,
    rows: Sequence[Tensor | None] = (),
    tables: Sequence[int] = (),
    first_columns: Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """csrc/gradient_parts.h's GradientArguments for T K gradients (None for a missing one), K of each task.

    Args:
        grads: no column is missing in every task. Of a sparse gradient, its values.
        rows: of sparse gradients, their sorted row numbers [T K]; empty where all are dense.
        tables: for each column the rows of its sparse gradients' tensors, 0 for dense gradients [K]; empty likewise.
        first_columns: as from `by_part`; None for one part.
    """
    count = len(grads) // tasks
    columns = [any_of(grads[k::count]) for k in range(count)]
    addresses, codes = [address(grad) for grad in grads], [DTYPE_CODES[column.dtype] for column in columns]
    if not rows:
        return addresses, [column.numel() for column in columns], codes, tasks, [], [], [], first_columns or []
    widths = [column.shape[1] if table else 0 for column, table in zip(columns, tables, strict=True)]
    sizes = [table * width or column.numel() for column, table, width in zip(columns, tables, widths, strict=True)]
    counts = [0 if ids is None else len(ids) for ids in rows]
    return addresses, sizes, codes, tasks, widths, [address(ids) for ids in rows], counts, first_columns or []
