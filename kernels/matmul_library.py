"""Which of torch's two libraries multiplies matrices on CPUs in `linear`.

torch multiplies them by its BLAS (MKL in the x86 wheels) and has oneDNN beside it, which is the faster on some
processors. The two round differently, so the choice is never implicit: it is BLAS until `set_matmul` changes it, and a
training run records its choice of float32's. With oneDNN, the products that give outputs and gradients of inputs
are oneDNN's. Those that give gradients of weights stay BLAS's, which reads their transposed operands where they lie;
oneDNN copies them first and was 0.8 to 1.0 times as fast (Zen 4 with AVX-512).

bfloat16 is oneDNN's either way. Where the processor multiplies it, outputs come from oneDNN's own linear layer, which
adds the bias to the float32 sum: torch's copies the bias to the output first.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

CHOICES = ("blas", "onednn")
ROWS = 1024  # of the products that are timed: tokens of a usual step
NARROW = 256  # encoders below this width are not measured: their products take little of a step
ROUNDS = (7, 31)  # at least and at most; after the former, no more once SECONDS have passed
SECONDS = 0.4
MARGIN = 1.05  # oneDNN must be this many times as fast: a tie goes to BLAS, in every run alike
KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "96", "LRU_CACHE_CAPACITY": "96"}  # oneDNN's cache, and torch's before it

_chosen = "blas"


def matmul() -> str:
    """The library of float32 products on CPUs: "blas" or "onednn"."""
    return _chosen


def set_matmul(name: str) -> None:
    """Choose the library of float32 products on CPUs for `linear`: "blas", "onednn", or "auto" to time both now.

    Raises:
        ValueError: another name, or oneDNN where torch was built without it.
    """
    global _chosen
    if name not in ("auto", *CHOICES):
        raise ValueError(f"set_matmul: name must be one of 'auto', 'blas', 'onednn', got {name!r}")
    if name == "onednn" and not torch.backends.mkldnn.is_available():
        raise ValueError(f"set_matmul: torch {torch.__version__} was built without oneDNN here; 'blas' is there")
    _chosen = faster_matmul() if name == "auto" else name


@contextmanager
def use_matmul(name: str) -> Iterator[None]:
    """`set_matmul` for the length of a `with` block."""
    global _chosen
    before = _chosen
    try:
        set_matmul(name)
        yield
    finally:
        _chosen = before


def faster_matmul(hidden: int = 384, inner: int = 1536) -> str:
    """Time both libraries on the feed-forward layers of an encoder, and name the faster: "blas" or "onednn".

    Each round times the products [N, hidden] x [hidden, inner] and [N, inner] x [inner, hidden] as they occur forward
    and as they occur in the gradients of inputs, by one library and then by the other, which comes first in turns: both
    meet the same state of the machine. oneDNN is chosen where it is clearly the faster in three of four rounds: what
    else runs on the machine hits some of them, and BLAS is the right answer where nothing is known.

    Args:
        hidden: width of the encoder; one below `NARROW` gets "blas" without a measurement.
        inner: width of its feed-forward layers.
    """
    if hidden < NARROW or not torch.backends.mkldnn.is_available():
        return "blas"
    x, grad = torch.ones(ROWS, hidden), torch.ones(ROWS, inner)
    up, down = torch.ones(inner, hidden), torch.ones(hidden, inner)
    products = ((x, up), (grad, down), (x, down.t()), (grad, up.t()))
    ratios: list[float] = []
    end = float("inf")
    for round_ in range(-2, ROUNDS[1]):  # two rounds to warm up: threads, pages, and the code that oneDNN generates
        seconds = {}
        for name in CHOICES if round_ % 2 else reversed(CHOICES):
            started = time.perf_counter()
            for a, weight in products:
                by_onednn(a, weight) if name == "onednn" else F.linear(a, weight)
            seconds[name] = time.perf_counter() - started
        if round_ == 0:
            end = time.perf_counter() + SECONDS
        if round_ >= 0:
            ratios.append(seconds["blas"] / seconds["onednn"])
        if len(ratios) >= ROUNDS[0] and time.perf_counter() > end:
            break
    return "onednn" if statistics.quantiles(ratios, n=4)[0] > MARGIN else "blas"


def keep_few_products() -> None:
    """Let oneDNN keep the code that it generated for 96 products, not for 1024, unless the environment says otherwise.

    It generates code for every number of rows. That of a step's tokens seldom comes again: what is kept for it is used
    by the layers of one pass, and is then memory that grows over hundreds of steps. A layer has 4 products forward, and
    4 for its input and 4 for the weights of every task backward: 68 with 16 tasks.
    Other models of the process share this cache, so that it is for a process that trains and predicts by minbert alone.
    Without effect after the first product by oneDNN.
    """
    for name, kept in KEPT.items():
        os.environ.setdefault(name, kept)


def reasons_against_onednn(device: torch.device, *dtypes: torch.dtype) -> Iterator[str]:
    """Why `product` does not run oneDNN for such inputs, one line each."""
    if _chosen != "onednn" and dtypes != (torch.bfloat16,):
        yield f'set_matmul("{_chosen}") is in effect'
    if device.type != "cpu":
        yield f"runs on cpu devices only, not on {device.type}"
    if not torch.backends.mkldnn.is_available():
        yield "torch was built without oneDNN"
    for dtype in dtypes:
        if dtype == torch.bfloat16 and (native.refusal() is not None or not multiplies_bfloat16()):
            yield "this processor, or oneDNN on it, multiplies no bfloat16"
        elif dtype not in (torch.float32, torch.bfloat16):
            yield f"takes float32 or bfloat16, not {str(dtype).removeprefix('torch.')}"


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions that multiply bfloat16, and oneDNN is let use them."""
    features = native.cpu_features()
    has_instructions = features["avx512_bf16"] or features["amx_bf16"]
    return bool(has_instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_in_tiles() -> bool:
    """Whether oneDNN multiplies bfloat16 by the processor's matrix unit, AMX, which the C++ here does not."""
    return multiplies_bfloat16() and native.cpu_features()["amx_bf16"]


def multiplied_by_onednn(x: Tensor) -> bool:
    """Whether `product` with x runs oneDNN."""
    return x.numel() > 0 and next(reasons_against_onednn(x.device, x.dtype), None) is None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias by the library that is chosen."""
    return by_onednn(x, weight, bias) if multiplied_by_onednn(x) else F.linear(x, weight, bias)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
