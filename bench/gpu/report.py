"""What the GPU is, what it runs on, and what it reaches in a copy and in a product of matrices; changes no setting."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "torchjd",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "liger-kernel",
    "numpy",
    "pytest",
    "setuptools",
    "pybind11",
    "cmake",
)
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit,pstate"


def ask(*command: str) -> str:
    """What a command prints, or why it printed nothing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{command[0]}: {error}"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def seconds(function: Callable[[], object], calls: int = 10) -> float:
    """The median of as many calls, after three."""
    times = []
    for i in range(calls + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[calls // 2]


def report() -> dict[str, object]:
    device = torch.cuda.get_device_properties(0)
    smi = ("nvidia-smi", "--format=csv,noheader", f"--query-gpu={CLOCKS}")
    found: dict[str, object] = {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "l2_bytes": device.L2_cache_size,
        "driver": ask("nvidia-smi", "--format=csv,noheader", "--query-gpu=driver_version"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "nvcc": ask("nvcc", "--version").rpartition("\n")[2],
        "compute-sanitizer": ask("compute-sanitizer", "--version").rpartition("\n")[2],
        "packages": {name: version(name) for name in PACKAGES},
        "clocks before": dict(zip(CLOCKS.split(","), ask(*smi).split(", "), strict=False)),
    }
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    found["copy, bytes read and written per second"] = 2 * 2**31 / seconds(lambda: target.copy_(source))
    for size in (4096, 8192):
        x, y = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
        found[f"product of bf16 matrices {size}, operations per second"] = 2 * size**3 / seconds(lambda: x @ y)  # noqa: B023
    found["clocks after"] = dict(zip(CLOCKS.split(","), ask(*smi).split(", "), strict=False))
    found["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return found


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device")
    print(json.dumps(report(), indent=1))
