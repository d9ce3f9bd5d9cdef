"""The row-wise ops, forward and backward, against eager PyTorch with torch's own dropout, and the copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minbert import kernels

P, EPS = 0.1, 1e-12


def tensors(rows: int, columns: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, columns, generator=generator).to(dtype).requires_grad_() for _ in range(count)]


def both_ways(function: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """The op and its gradients."""
    return lambda: torch.autograd.grad(function(), inputs, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["dropout_add_layer_norm", "bias_gelu"])
def test_rows(race, smoke: bool, op: str, dtype: torch.dtype) -> None:
    rows, columns = (16, 32) if smoke else (8192, 768 if op == "dropout_add_layer_norm" else 3072)
    x, residual, grad = tensors(rows, columns, dtype, 3)
    weight, bias = (torch.ones(columns, requires_grad=True) for _ in range(2))
    seed = torch.tensor(1)
    source, target = (torch.zeros(rows, columns, dtype=dtype) for _ in range(2))
    if op == "bias_gelu":
        inputs = [x, bias]
        own_bias = bias.to(dtype)
        ours = lambda: kernels.bias_gelu(x, bias)  # noqa: E731
        eager = lambda: F.gelu(x + own_bias)  # noqa: E731
        tensors_moved = {"forward": 2, "backward": 3}  # x, y; d_y, x, d_x
    else:
        inputs = [x, residual, weight, bias]
        own = [weight.to(dtype), bias.to(dtype)]
        ours = lambda: kernels.dropout_add_layer_norm(  # noqa: E731
            x, residual, weight, bias, eps=EPS, dropout_p=P, seed=seed, stream_id=1
        )
        eager = lambda: F.layer_norm(residual + F.dropout(x, P), (columns,), *own, EPS)  # noqa: E731
        tensors_moved = {"forward": 3, "backward": 5}  # x, residual, y; d_y, x, residual, d_x, d_residual
    size = rows * columns * dtype.itemsize
    race(
        f"{op} [{rows}, {columns}] {str(dtype).removeprefix('torch.')}",
        {
            "minbert forward + backward": both_ways(ours, inputs, grad),
            "minbert forward": ours,
            "copy": lambda: target.copy_(source),
            "eager forward + backward": both_ways(eager, inputs, grad),
            "eager forward": eager,
        },
        {
            "minbert forward + backward": sum(tensors_moved.values()) * size,
            "minbert forward": tensors_moved["forward"] * size,
            "copy": 2 * size,
        },
    )


def test_embedding(race, smoke: bool) -> None:
    tokens, columns, vocabulary = (16, 32, 50) if smoke else (8192, 768, 30522)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(size, (tokens,), generator=generator) for size in (vocabulary, 2, 128)]
    tables = [torch.randn(size, columns, generator=generator).requires_grad_() for size in (vocabulary, 2, 128)]
    weight, bias = (torch.ones(columns, requires_grad=True) for _ in range(2))
    seed, grad, inputs = torch.tensor(1), torch.ones(tokens, columns), [*tables, weight, bias]

    def ours() -> Tensor:
        return kernels.embedding(*ids, *tables, weight, bias, eps=EPS, dropout_p=P, seed=seed)

    def eager() -> Tensor:
        total = sum((F.embedding(i, table) for i, table in zip(ids, tables, strict=True)), torch.zeros(()))
        return F.dropout(F.layer_norm(total, (columns,), weight, bias, EPS), P)

    race(
        f"embedding {tokens} tokens, {columns} wide",
        {
            "minbert forward + backward": both_ways(ours, inputs, grad),
            "minbert forward": ours,
            "eager forward + backward": both_ways(eager, inputs, grad),
            "eager forward": eager,
        },
    )
