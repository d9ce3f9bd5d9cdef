"""Calls of native code: addresses, sizes and dtype codes for csrc/kernels.h, threads on CPUs, streams on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
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


def dropout(p: float, seed: Tensor | None, stream_id: int, first_row: int = 0) -> tuple[int, int, int, float, int]:
    """The seed's address, threshold, stream id, the scale of kept elements, and the op's row that is row 0 here.

    A threshold of 0 drops nothing.
    """
    return address(seed), reference.drop_threshold(p), stream_id, 1 / (1 - p), first_row


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
