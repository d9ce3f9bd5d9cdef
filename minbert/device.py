"""What a run computes on."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minbert import kernels
from minbert.errors import UserError
from minbert.kernels.dispatch import too_old

MALLOPT = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # malloc.h
LARGEST_THRESHOLD = 2**25  # bytes; the largest that glibc raises its mmap_threshold to by itself on 64 bits

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def resolve_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda or cuda:N. Of several processes on a machine each has a GPU of its own.

    auto is the CPU where the GPU is older than minbert's kernels take; a line on standard error says so. Several
    processes take the same: where one's GPU is that old, all of the machine's are on the CPU.

    Raises:
        UserError: no such device here, or a GPU that is too old.
    """
    rank = os.environ.get("LOCAL_RANK")  # of torchrun's processes
    own = "cuda" if rank is None else f"cuda:{rank}"
    if name == "auto":
        name = own if torch.cuda.is_available() else "cpu"
        ranks = range(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        everyones = ["cuda"] if rank is None else [f"cuda:{other}" for other in ranks]
        old = next(filter(None, map(too_old, map(torch.device, everyones))), None)
        if name != "cpu" and old is not None:
            if rank in (None, "0"):
                _warn_once(f"the CPU is used: minbert {old}")
            name = "cpu"
    if name == "cuda":
        name = own
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    if (old := too_old(device)) is not None:
        raise UserError(f"--device {name}: minbert {old}; use --device cpu")
    return device


@functools.cache
def _warn_once(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")  # in one write: other processes may write too


def resolve_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16; auto is bf16 on hardware that multiplies bf16 matrices."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = too_old(device) is None  # older GPUs emulate bf16
    else:
        features = kernels.native.cpu_features()
        fast = features["avx512_bf16"] or features["amx_bf16"]
    return "bf16" if fast else "fp32"


@contextmanager
def settings(threads: int | None, backend: str) -> Iterator[None]:
    """Choose CPU threads (None leaves them) and kernels in this block; afterwards they, the library of matrix products
    and torch's generator are as before it."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), kernels.use_backend(backend), kernels.use_matmul(kernels.matmul()):
        try:
            if threads:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: else each step's large tensors are pages that the kernel has to zero anew.

    For the whole process and for good: it is for the commands to call, not for a library.
    """
    _set_malloc(trim_threshold=-1, mmap_max=0)  # never give back; no allocation of its own pages


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """`keep_freed_memory` in this block, on a CPU. Afterwards what is free is given back.

    glibc does not tell its options. It raises two thresholds itself up to the values that are set afterwards, as
    programs that free large tensors have them.
    """
    if device.type != "cpu":
        yield
        return
    keep_freed_memory()
    try:
        yield
    finally:
        _set_malloc(trim_threshold=2 * LARGEST_THRESHOLD, mmap_threshold=LARGEST_THRESHOLD, mmap_max=65536, trim=True)


def _set_malloc(*, trim: bool = False, **options: int) -> None:
    """Set options of glibc's malloc, and with `trim` give back what is free; nothing where there is another malloc."""
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for name, value in options.items():
            libc.mallopt(MALLOPT[name], value)
        if trim:
            libc.malloc_trim(0)


def describe(device: torch.device, precision: str) -> str:
    """One line: the device, the precision, and which kernels run compiled."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    n = torch.get_num_threads()
    threads = "" if device.type == "cuda" else f", {n} thread{'s' * (n > 1)}"
    return f"{where}{threads}, {precision}, torch {torch.__version__}"


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory this process has held: allocated on a GPU, resident on a CPU; None where the system keeps no
    count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
