"""A product of matrices, and the same with a limit that it cannot keep."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from minbert.kernels.triton.ahead import Compilation


@triton.jit
def product(x, y, out, inner, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, inner, SIZE):
        x_tile = tl.load(x + i[:, None] * STRIDE + (k + i)[None, :])
        y_tile = tl.load(y + (k + i)[:, None] * STRIDE + i[None, :])
        total = tl.dot(x_tile, y_tile, total)
    tl.store(out + i[:, None] * STRIDE + i[None, :], total.to(out.dtype.element_ty))


def compilations() -> Iterator[Compilation]:
    signature = {"x": "*bf16", "y": "*bf16", "out": "*bf16", "inner": "i32"}
    for name, registers in (("product", 255), ("product in 32 registers", 32)):
        constants = {"STRIDE": 1024, "SIZE": 64}
        yield Compilation(name, product, signature, constants, (*signature,), 4, num_stages=2, registers=registers)
