"""Attention of first tokens on a GPU: as near to float64 as the reference, with attention's masks to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minbert.kernels import reference
from minbert.kernels.attention_plan import AttentionProblem
from minbert.kernels.triton import first_token_attention

SEED, STREAM_ID = (-(2**40) + 77, 2**32 - 30), 2**32 - 6  # with the first row's number
LENGTHS = [27, 1, 64, 33]


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, and a gradient."""
    tokens, sequences = sum(LENGTHS), len(LENGTHS)
    shapes = (sequences, heads, head_dim), (tokens, 2, heads, head_dim), (sequences, heads, head_dim)
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def stream() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def by_kernels(tensors: list[Tensor], p: float, device: torch.device) -> list[Tensor]:
    """The result, and the gradients of queries, keys and values, in memory that held NaN."""
    queries, keys_values, grad_out = (tensor.to(device) for tensor in tensors)
    seed = torch.tensor(SEED, device=device) if p else None
    scale = queries.shape[2] ** -0.5
    problem = AttentionProblem(keys_values, stream().to(device), max(LENGTHS), p, seed, STREAM_ID, scale)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        out = first_token_attention.attention(queries, problem)
        grad_queries, grad_keys_values = first_token_attention.attention_backward(grad_out, queries, problem)
    finally:
        torch.use_deterministic_algorithms(False)
    return [tensor.cpu() for tensor in (out, grad_queries, *grad_keys_values.unbind(1))]


def specified(tensors: list[Tensor], p: float) -> list[Tensor]:
    queries, keys_values = (tensor.detach().requires_grad_() for tensor in tensors[:2])
    heads, head_dim = queries.shape[1:]
    keep = reference.attention_dropout_mask(stream(), heads, p, torch.tensor(SEED), STREAM_ID) if p else None
    out = reference.first_token_attention(queries, keys_values, stream(), keep, p, head_dim**-0.5)
    grad_queries, grad_keys_values = torch.autograd.grad(out, (queries, keys_values), tensors[2])
    return [out.detach(), grad_queries, *grad_keys_values.unbind(1)]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 32), (6, 24)])
def test_is_as_near_to_float64_as_the_reference(
    device: torch.device, heads: int, head_dim: int, dtype: torch.dtype, p: float
) -> None:
    tensors = inputs(heads, head_dim, dtype)
    exact = specified([tensor.double() for tensor in tensors], p)
    for got, theirs, wanted in zip(by_kernels(tensors, p, device), specified(tensors, p), exact, strict=True):
        assert got.dtype == dtype
        noise = 1e-7 * wanted.norm().item() + 1e-9 * math.sqrt(wanted.numel())
        assert (got.double() - wanted).norm() <= 2 * (theirs.double() - wanted).norm() + noise


def test_drops_what_attention_drops(device: torch.device) -> None:
    """With equal scores and each token's position as its value, a result tells which probabilities were kept."""
    queries, keys_values, grad_out = inputs(5, 64, torch.float32)
    keys_values[:, 1] = torch.cat([torch.eye(64)[:n] for n in LENGTHS])[:, None]
    tensors = [torch.zeros_like(queries), keys_values, grad_out]
    got, wanted = by_kernels(tensors, 0.5, device)[0], specified(tensors, 0.5)[0]
    assert torch.equal(got != 0, wanted != 0)
    assert 0.3 < (got[2] != 0).float().mean() < 0.7
