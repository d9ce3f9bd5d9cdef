"""The GPU kernels in Triton. Importing this package loads no triton; its modules do, when tensors on a GPU come."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def available() -> bool:
    """Whether triton is there; torch's CUDA builds bring it along."""
    return importlib.util.find_spec("triton") is not None
