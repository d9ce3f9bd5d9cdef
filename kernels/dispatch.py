"""Which backend runs an op: compiled code or the PyTorch reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import native, triton
from .matmul_library import matmul

CHOICES = ("auto", "reference")

# What compiled code an op has for a type of device: "native" is C++ or CUDA C++ (csrc/), "triton" is kernels/triton/.
_COMPILED: dict[str, dict[str, str]] = {
    "adamw_": {"cpu": "native", "cuda": "native"},
    "attention": {"cpu": "native", "cuda": "triton"},
    "attention_dropout_mask": {"cpu": "native"},  # only tests ask for it: attention makes its mask inside
    "bias_gelu": {"cpu": "native", "cuda": "triton"},
    "combine": {"cpu": "native", "cuda": "native"},
    "combine_adamw_": {"cpu": "native", "cuda": "native"},
    "dropout": {"cpu": "native", "cuda": "triton"},
    "dropout_add_layer_norm": {"cpu": "native", "cuda": "triton"},
    "dropout_mask": {"cpu": "native", "cuda": "native"},
    "embedding": {"cpu": "native", "cuda": "triton"},
    "gram": {"cpu": "native", "cuda": "native"},
    "smart_ascend": {"cpu": "native", "cuda": "native"},
    "smart_init": {"cpu": "native", "cuda": "native"},
    "surgery_weights": {"cpu": "native", "cuda": "native"},
}

_choice = "auto"


def choice() -> str:
    """The backend that is chosen: "auto" or "reference"."""
    return _choice


def set_backend(name: str) -> None:
    """Choose the backend for all ops: "auto" (compiled code where there is some) or "reference" (plain PyTorch).

    Raises:
        ValueError: another name.
    """
    global _choice
    if name not in CHOICES:
        raise ValueError(f"set_backend: name must be one of {', '.join(map(repr, CHOICES))}, got {name!r}")
    _choice = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the length of a `with` block."""
    before = _choice
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def compiled(op: str, device: torch.device) -> str | None:
    """What runs `op` for tensors on `device`: "native" or "triton", or None where only the reference does."""
    kind = _COMPILED[op].get(device.type)
    if _choice == "reference" or kind is None:
        return None
    if kind == "triton":
        return kind if triton.available() else None
    found = native.cuda_available() if device.type == "cuda" else native.available()
    return kind if found else None


def backends(device: torch.device | str) -> dict[str, str]:
    """What would run for tensors on `device`: "native", "triton", "reference", or "oneDNN" (float32 layers on CPUs).

    The encoder's ops are compiled for float32 and bfloat16, on GPUs for float16 too; other dtypes run the reference.
    """
    device = torch.device(device)
    found = {op: compiled(op, device) or "reference" for op in _COMPILED}
    onednn = device.type == "cpu" and _choice == "auto" and matmul() == "onednn"
    return {**found, "linear": "oneDNN" if onednn else "reference"}
