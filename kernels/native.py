"""Finds the compiled extension, or the reason why there is none."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch  # noqa: F401  must come first: the extension takes its OpenMP symbols from the runtime that torch loads

INTERFACE = 14  # csrc/kernels.h's kInterface
ISAS = ("portable", "avx2", "avx512", "avx512bf16")  # the instruction sets of csrc/bindings.cpp, narrowest first
_NAME = "minbert.kernels._native"
_BUILD = "to build it, run `pip install -e . -v` with a C++17 compiler at hand"


def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(_NAME) is None:
        return None, f"the native extension {_NAME} is not built"
    try:
        module = importlib.import_module(_NAME)
    except ImportError as error:
        return None, f"the native extension {_NAME} does not load ({error})"
    if module.INTERFACE != INTERFACE:
        return None, (
            f"the native extension {_NAME} was built from another version of the source "
            f"(interface {module.INTERFACE}, expected {INTERFACE})"
        )
    if os.path.dirname(module.__file__ or "") != os.path.dirname(__file__):
        return None, f"the native extension {_NAME} is not built here, and that of another minbert is {module.__file__}"
    return module, None


def _force_isa(wanted: str) -> str | None:
    """Let the kernels of the instruction set `wanted` run, and return None, or the reason why they cannot run."""
    if _library is None:
        return f"MINBERT_ISA is {wanted!r}, but {_reason}: {_BUILD}, or leave MINBERT_ISA unset"
    if wanted not in _library.isas():
        here = ", ".join(_library.isas())
        return f"MINBERT_ISA must be one of {here} (what this processor runs) or unset for the widest, got {wanted!r}"
    _library.set_isa(wanted)
    return None


_library, _reason = _load()
_refusal = _force_isa(os.environ["MINBERT_ISA"]) if os.environ.get("MINBERT_ISA") else None


def refusal() -> str | None:
    """Why the instruction set that the environment variable MINBERT_ISA names cannot run, in one line, or None."""
    return _refusal


def available() -> bool:
    """Whether the extension is there.

    Raises:
        ValueError: MINBERT_ISA names an instruction set that cannot run.
    """
    if _refusal is not None:
        raise ValueError(_refusal)
    return _library is not None


def library() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it is missing; the message says why and what to do.
        ValueError: MINBERT_ISA names an instruction set that cannot run.
    """
    if not available():
        raise RuntimeError(missing_reason())
    return _library  # type: ignore[return-value]


def missing_reason() -> str | None:
    """Why the extension is missing and how to get it, in one line; None when it is there."""
    return f"{_reason}: the slower reference ops run instead; {_BUILD}" if _reason else None


def cuda_available() -> bool:
    """Whether the extension is there and was built with its CUDA part."""
    return available() and library().CUDA


def isa() -> str | None:
    """The instruction set whose kernels run on CPUs, one of `ISAS`; None without the extension.

    It is the widest that the processor has, or what the environment variable MINBERT_ISA named when this module was
    imported.
    """
    return library().get_isa() if available() else None


def cpu_features() -> dict[str, bool]:
    """Whether this processor has avx2, avx512, avx512_bf16 and amx_bf16, as far as `isa` may use them.

    All are False without the extension and for the portable instruction set.
    """
    level = ISAS.index(isa() or "portable")
    needed = {"avx2": 1, "avx512": 2, "avx512_bf16": 3, "amx_bf16": 3}
    found = library().cpu_features() if available() else {}
    return {feature: level >= least and found[feature] for feature, least in needed.items()}
