"""Which backend runs an op: native code or the PyTorch reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import native

CHOICES = ("auto", "reference")

# The device types for which an op has native code.
_NATIVE: dict[str, tuple[str, ...]] = {
    "adamw_": ("cpu",),
    "attention": ("cpu",),
    "attention_dropout_mask": ("cpu",),
    "bias_gelu": ("cpu",),
    "combine": ("cpu",),
    "combine_adamw_": ("cpu",),
    "dropout": ("cpu",),
    "dropout_add_layer_norm": ("cpu",),
    "dropout_mask": ("cpu", "cuda"),
    "embedding": ("cpu",),
    "gram": ("cpu",),
    "smart_ascend": ("cpu",),
    "smart_init": ("cpu",),
}

_choice = "auto"


def choice() -> str:
    """The backend that is chosen: "auto" or "reference"."""
    return _choice


def set_backend(name: str) -> None:
    """Choose the backend for all ops: "auto" (native code where there is some) or "reference" (plain PyTorch).

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


def runs_native(op: str, device: torch.device) -> bool:
    """Whether `op` runs native code for tensors on `device`."""
    if _choice == "reference" or device.type not in _NATIVE[op]:
        return False
    return native.cuda_available() if device.type == "cuda" else native.available()


def backends(device: torch.device | str) -> dict[str, str]:
    """What would run for tensors on `device`: "native" or "reference" for every op ("oneDNN" for float32 layers).

    The encoder's ops are native for float32 and bfloat16; float16 and float64 run the reference.
    """
    device = torch.device(device)
    from .linear import runs_onednn  # it reads the choice from here

    found = {op: "native" if runs_native(op, device) else "reference" for op in _NATIVE}
    return {**found, "linear": "oneDNN" if runs_onednn(device) else "reference"}
