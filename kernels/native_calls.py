"""Calls of native code: addresses, sizes and dtype codes for csrc/kernels.h, threads on CPUs, streams on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
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


def any_of(grads: Sequence[Tensor | None]) -> Tensor:
    """The first tensor of a list that holds one."""
    return next(grad for grad in grads if grad is not None)


def task_gradients(grads: Sequence[Tensor | None], tasks: int) -> tuple[list[int], list[int], list[int], int]:
    """Addresses [T * K] (0 for a missing tensor), sizes [K], dtype codes [K], T; no column is missing in every task."""
    count = len(grads) // tasks
    columns = [any_of(grads[k::count]) for k in range(count)]
    codes = [DTYPE_CODES[column.dtype] for column in columns]
    return [address(grad) for grad in grads], [column.numel() for column in columns], codes, tasks
