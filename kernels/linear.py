"""Linear layers in float32 on CPUs, by whichever of torch's two matrix libraries is faster on this machine.

torch multiplies float32 matrices with its BLAS (MKL in the x86 wheels) and has oneDNN beside it. On some processors
oneDNN is much the faster. Which one is measured once per machine and kept, not guessed from the vendor's name: the two
round differently, and a choice made anew in every process would make runs differ.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .cache import cache_directory
from .dispatch import choice

MEASURED = (1024, 384, 1536)  # rows, inputs and outputs of the layer that is measured: BERT-small's intermediate one
ROUNDS = 7
MARGIN = 1.1  # oneDNN must be this many times faster to be chosen


@torch.library.custom_op("minbert::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _by_onednn(x, weight, bias) if _onednn_wins() else F.linear(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    return (
        _linear(grad, weight.t(), None) if for_x else None,
        _linear(grad.t(), x.t(), None) if for_weight else None,
        grad.sum(0) if for_bias else None,
    )


_linear.register_autograd(_backward, setup_context=_save)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: [N, inputs], any dtype that torch multiplies.
        weight: [outputs, inputs].
        bias: [outputs].

    Returns:
        [N, outputs].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("linear", "x", x, ["N", "inputs"], checks.FLOATS, contiguous=False)
    checks.tensor("linear", "weight", weight, ["outputs", x.shape[1]], [x.dtype], like=x, contiguous=False)
    if bias is not None:
        checks.tensor("linear", "bias", bias, [weight.shape[0]], [x.dtype], like=x)
    if x.dtype == torch.float32 and x.device.type == "cpu" and choice() == "auto":
        return _linear(x, weight, bias)
    return F.linear(x, weight, bias)


def runs_onednn(device: torch.device) -> bool:
    """Whether float32 layers on `device` go to oneDNN, rather than to torch's own choice."""
    return device.type == "cpu" and choice() == "auto" and _onednn_wins()


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.lru_cache(maxsize=1)
def _onednn_wins() -> bool:
    """Whether oneDNN is the faster one on this machine: read from the cache, or measured now and kept there."""
    if not torch.backends.mkldnn.is_available():
        return False
    file = cache_directory() / "linear.json"
    machine = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    verdicts = _read(file)
    if machine not in verdicts:
        verdicts[machine] = _measure()
        _write(file, verdicts)
    return verdicts[machine]


def _measure() -> bool:
    rows, inputs, outputs = MEASURED
    x, weight = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    ways: list[Callable[[], Tensor]] = [lambda: F.linear(x, weight), lambda: _by_onednn(x, weight)]
    seconds: list[list[float]] = [[], []]
    for way in ways:
        way()
    for _ in range(ROUNDS):
        for way, times in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    blas, onednn = map(statistics.median, seconds)
    return blas > MARGIN * onednn


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _read(file: Path) -> dict[str, bool]:
    try:
        verdicts = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _write(file: Path, verdicts: dict[str, bool]) -> None:
    """Keep the verdicts; a cache that cannot be written means that the next process measures again."""
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(verdicts, indent=2))
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
