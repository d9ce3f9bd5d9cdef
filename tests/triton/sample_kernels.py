"""A product of matrices, and the same with a limit that it cannot keep, and where it has to spill registers."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from configurations import Compilation


@triton.jit
def product(x, y, out, inner, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, inner, SIZE):
        x_tile = tl.load(x + i[:, None] * STRIDE + (k + i)[None, :])
        y_tile = tl.load(y + (k + i)[:, None] * STRIDE + i[None, :])
        total = tl.dot(x_tile, y_tile, total)
    tl.store(out + i[:, None] * STRIDE + i[None, :], total.to(out.dtype.element_ty))


def compilations() -> list[Compilation]:
    signature = {"x": "*bf16", "y": "*bf16", "out": "*bf16", "inner": "i32"}
    product_of_64 = Compilation(
        "product", product, signature, {"STRIDE": 1024, "SIZE": 64}, (*signature,), num_warps=4, num_stages=2
    )
    return [
        product_of_64,
        replace(product_of_64, name="product in 32 registers", registers=32),
        replace(product_of_64, name="product that spills", options={"maxnreg": 48}, architectures=(80,)),
    ]
