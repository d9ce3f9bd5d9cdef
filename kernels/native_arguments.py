"""What the row-wise ops hand to native code."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .native import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/kernels.h's DType
LARGEST_ON_GPU = 4096  # columns of a row that kernels/triton/row_tiles.py keeps in registers


def takes(device: torch.device, columns: int, *dtypes: torch.dtype) -> bool:
    """Whether compiled code takes rows of so many columns in these dtypes; else they are left to the reference."""
    if device.type == "cuda":
        return columns <= LARGEST_ON_GPU and all(dtype in (*_DTYPES, torch.float16) for dtype in dtypes)
    return all(dtype in _DTYPES for dtype in dtypes)


def dtype_code(tensor: Tensor) -> int:
    return _DTYPES[tensor.dtype]


def activation(x: Tensor) -> tuple[int, int, int]:
    """Rows, columns and dtype of x [N, D]."""
    return x.shape[0], x.shape[1], dtype_code(x)


def dropout(p: float, seed: Tensor | None, stream_id: int, first_row: int = 0) -> tuple[int, int, int, float, int]:
    """The seed's address, threshold, stream id, the scale of kept elements, and the op's row that is row 0 here.

    A threshold of 0 drops nothing.
    """
    return 0 if seed is None else seed.data_ptr(), reference.drop_threshold(p), stream_id, 1 / (1 - p), first_row


def scratch(rows: int, columns: int) -> Tensor:
    """Scratch memory for an activation [rows, columns]."""
    return torch.empty(library().row_scratch(rows, columns), dtype=torch.float32)
