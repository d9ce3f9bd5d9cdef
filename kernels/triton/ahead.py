"""Which configurations of a kernel are shipped, so that each can be compiled, and judged, where no GPU is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Compilation:
    """A kernel as one of its launches compiles it. Every module of kernels gives its own in `compilations()`.

    Args:
        name: what tells it from the others, such as "attention forward, bf16, head dim 64, 32 rows".
        kernel: the function that `triton.jit` made.
        signature: argument -> type ("*bf16", "i32", "fp32"), without the constants.
        constants: argument -> value of those that are tl.constexpr.
        divisible: the arguments that are divisible by 16 in every launch: aligned pointers, strides of whole rows.
        num_warps, num_stages: as launched.
        registers, shared_memory: the most that a thread and a program may take, in 4-byte registers and bytes. None may
            spill.
        architectures: on which it is launched.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    registers: int = 255
    shared_memory: int = 99 * 1024  # of sm_86 and sm_89, the least of those we ship for
    architectures: tuple[int, ...] = ARCHITECTURES
