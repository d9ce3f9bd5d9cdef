"""Finds the compiled extension, or the reason why there is none."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch  # noqa: F401  must come first: the extension takes its OpenMP symbols from the runtime that torch loads

INTERFACE = 6  # csrc/launch.h's kInterface
_NAME = "minbert.kernels._native"
_REMEDY = "the slower reference ops run instead; to build it, run `pip install -e . -v` with a C++17 compiler at hand"


def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(_NAME) is None:
        return None, f"the native extension {_NAME} is not built: {_REMEDY}"
    try:
        module = importlib.import_module(_NAME)
    except ImportError as error:
        return None, f"the native extension {_NAME} does not load ({error}): {_REMEDY}"
    if module.INTERFACE != INTERFACE:
        return None, (
            f"the native extension {_NAME} was built from another version of the source "
            f"(interface {module.INTERFACE}, expected {INTERFACE}): {_REMEDY}"
        )
    return module, None


_library, _reason = _load()


def library() -> ModuleType:
    """The extension module.

    Raises:
        RuntimeError: it is missing; the message says why and what to do.
    """
    if _library is None:
        raise RuntimeError(_reason)
    return _library


def available() -> bool:
    """Whether the extension is there."""
    return _library is not None


def missing_reason() -> str | None:
    """Why the extension is missing and how to get it, in one line; None when it is there."""
    return _reason


def cuda_available() -> bool:
    """Whether the extension is there and was built with its CUDA part."""
    return _library is not None and _library.CUDA


def cpu_features() -> dict[str, bool]:
    """Whether this processor has avx2, avx512, avx512_bf16 and amx_bf16; all False without the extension."""
    if _library is None:
        return dict.fromkeys(("avx2", "avx512", "avx512_bf16", "amx_bf16"), False)
    return _library.cpu_features()
