"""Which backend runs an op, compiled code or the PyTorch reference, and the reasons."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from . import matmul_library, native, triton
from .checks import FLOATS, GRADIENTS, names

CHOICES = ("auto", "reference")
WIDEST_ROW = 4096  # elements of a row that kernels/triton/row_tiles.py keeps in registers
WIDEST_HEAD = 128  # elements of an attention head
LEAST_CAPABILITY = (8, 0)  # of GPUs: Triton's kernels multiply bfloat16, and csrc/cuda is built for these and newer

_HALF_AND_SINGLE = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
_GRADIENTS = {"cpu": GRADIENTS, "cuda": GRADIENTS}
_ANY = {"cpu": FLOATS, "cuda": FLOATS}


class _Compiled(NamedTuple):
    """The compiled code of an op, and the inputs that it takes."""

    cpu: str | None  # "native": C++ (csrc/cpu)
    cuda: str | None  # "native": CUDA C++ (csrc/cuda), or "triton": kernels/triton
    dtypes: Mapping[str, tuple[torch.dtype, ...]]  # by type of device
    rows_in_registers: bool = False  # on GPUs


_COMPILED = {
    "adamw_": _Compiled("native", "native", _GRADIENTS),
    "attention": _Compiled("native", "triton", _HALF_AND_SINGLE),
    "attention_dropout_mask": _Compiled("native", None, _ANY),  # only tests call it: attention makes its mask inside
    "bias_gelu": _Compiled("native", "triton", _HALF_AND_SINGLE),
    "combine": _Compiled("native", "native", _GRADIENTS),
    "combine_adamw_": _Compiled("native", "native", _GRADIENTS),
    "dropout": _Compiled("native", "triton", _HALF_AND_SINGLE, rows_in_registers=True),
    "dropout_add_layer_norm": _Compiled("native", "triton", _HALF_AND_SINGLE, rows_in_registers=True),
    "dropout_mask": _Compiled("native", "native", _ANY),
    "embedding": _Compiled("native", "triton", _HALF_AND_SINGLE, rows_in_registers=True),
    "encoder_layers": _Compiled("native", None, _HALF_AND_SINGLE),
    "first_token_attention": _Compiled("native", "triton", _HALF_AND_SINGLE),
    "gram": _Compiled("native", "native", _GRADIENTS),
    "smart_ascend": _Compiled("native", "native", _HALF_AND_SINGLE),
    "smart_init": _Compiled("native", "native", _HALF_AND_SINGLE),
    "sums_of_rows": _Compiled("native", None, _HALF_AND_SINGLE),  # the gradient of a bias, within `linear`
    "surgery_weights": _Compiled("native", "native", _ANY),
    "task_weights": _Compiled("native", "native", _ANY),
}
_WITH_HEADS = ("attention", "encoder_layers", "first_token_attention")
OPS = (*(op for op in _COMPILED if op != "sums_of_rows"), "linear")

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


@functools.cache
def too_old(device: torch.device) -> str | None:
    """Why no kernels are compiled for a GPU, or None."""
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    least, own = (".".join(map(str, each)) for each in (LEAST_CAPABILITY, capability))
    return f"needs a GPU of compute capability {least} or newer, and {torch.cuda.get_device_name(device)} has {own}"


def reasons(
    op: str,
    backend: str,
    device: torch.device,
    *dtypes: torch.dtype,
    columns: int | None = None,
    head_dim: int | None = None,
) -> list[str]:
    """Why a compiled backend does not run an op for such inputs, one line each; empty if it does.

    Args:
        backend: "native", "triton" or "oneDNN".
        dtypes: of the inputs and of the result; none gives no reason that depends on them.
        columns: the elements of a row, for row-wise ops.
        head_dim: the elements of a head, for attention.

    Raises:
        ValueError: MINBERT_ISA names an instruction set that cannot run, and the reference is not chosen.
    """
    found = ['set_backend("reference") is in effect'] if _choice == "reference" else []
    if op == "linear":
        return found + list(matmul_library.reasons_against_onednn(device, *dtypes))
    code, kind = _COMPILED[op], device.type
    if backend != getattr(code, kind, None):
        kinds = [each for each in ("cpu", "cuda") if getattr(code, each) == backend]
        return [*found, f"runs on {' and '.join(kinds)} devices only, not on {kind}"]
    if kind == "cuda" and not torch.compiler.is_compiling() and (old := too_old(device)) is not None:
        found.append(old)
    if backend == "triton":
        if not triton.available():
            found.append("triton is not installed; torch's CUDA builds bring it along")
    else:
        if not found:
            native.available()  # raises the error
        if missing := native.refusal() or native.missing_reason():
            found.append(missing)
        elif kind == "cuda" and not native.cuda_available():
            found.append("the native extension was built without CUDA; build it with MINBERT_CUDA=1 where nvcc is")
    known = code.dtypes[kind]
    for dtype in dtypes:
        if dtype not in known:
            found.append(f"takes {names(known)}, not {names([dtype])}")
    in_bf16 = op == "encoder_layers" and torch.bfloat16 in dtypes and native.refusal() is None
    if in_bf16 and not native.cpu_features()["avx512_bf16"]:
        found.append("multiplies bfloat16 only on processors with avx512_bf16")
    if kind == "cuda" and code.rows_in_registers and columns is not None and columns > WIDEST_ROW:
        found.append(f"takes rows of up to {WIDEST_ROW} elements, not {columns}")
    if op in _WITH_HEADS and head_dim is not None and (head_dim % 8 != 0 or head_dim > WIDEST_HEAD):
        found.append(f"takes heads of 8, 16, 24, ... or {WIDEST_HEAD} elements, not {head_dim}")
    return found


def is_compiled(
    op: str, device: torch.device, *dtypes: torch.dtype, columns: int | None = None, head_dim: int | None = None
) -> bool:
    """Whether compiled code runs an op for such inputs: `reasons` gives none against the code for the device."""
    backend = getattr(_COMPILED[op], device.type, None)
    return backend is not None and not reasons(op, backend, device, *dtypes, columns=columns, head_dim=head_dim)


class BackendChoice(NamedTuple):
    """What runs an op, and why other compiled code does not."""

    runs: str  # "native", "triton", "oneDNN" or "reference"
    not_available: dict[str, list[str]]  # by name of a compiled backend of the op that does not run, all reasons


def backends(
    device: torch.device | str,
    *,
    explain: bool = False,
    dtype: torch.dtype | None = None,
    columns: int | None = None,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """What would run for tensors on `device`: "native", "triton", "reference", or "oneDNN" (float32 layers on CPUs).

    The encoder's ops are compiled for float32 and bfloat16, on GPUs for float16 too; other dtypes run the reference.

    Args:
        explain: return a `BackendChoice` for each op, with the reasons against the compiled code that does not run.
        dtype: of activations and gradients.
        columns: elements of a row of the activations.
        head_dim: elements of an attention head. What depends on a dtype or a size that is left out is not judged.

    Returns:
        by op the name of what runs, or with `explain` a `BackendChoice`.
    """
    device = torch.device(device)
    dtypes = [] if dtype is None else [dtype]
    found = {}
    for op in OPS:
        against = {
            backend: reasons(op, backend, device, *dtypes, columns=columns, head_dim=head_dim)
            for backend in (dict.fromkeys(filter(None, _COMPILED[op][:2])) if op in _COMPILED else ("oneDNN",))
        }
        runs = next((backend for backend, why in against.items() if not why), "reference")
        found[op] = BackendChoice(runs, {backend: why for backend, why in against.items() if why})
    return found if explain else {op: each.runs for op, each in found.items()}
