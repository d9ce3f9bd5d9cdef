"""Attention of first tokens: the rows that attention has for them, with its masks, for any thread count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minbert.kernels import attention, first_token_attention, native, use_backend

SEED, STREAM_ID = torch.tensor([-(2**40) + 77, 2**32 - 30]), 5
DTYPES = (torch.float32, torch.bfloat16)
OPS = ["minbert::first_token_attention", "minbert::first_token_attention_backward"]
LENGTHS = [27, 5, 90, 1, 33, 64, 65, 200]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, and a gradient."""
    tokens, sequences = sum(lengths), len(lengths)
    shapes = (sequences, heads, head_dim), (tokens, 2, heads, head_dim), (sequences, heads, head_dim)
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def stream(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run(tensors: list[Tensor], lengths: list[int], p: float, scale: float | None = None) -> list[Tensor]:
    """The result, and the gradients of queries, keys and values."""
    queries, keys_values, grad_out = tensors
    given = [tensor.detach().requires_grad_() for tensor in (queries, keys_values)]
    drop = {"dropout_p": p, "seed": SEED, "stream_id": STREAM_ID, "softmax_scale": scale}
    out = first_token_attention(*given, stream(lengths), max(lengths), **drop)
    grad_queries, grad_keys_values = torch.autograd.grad(out, given, grad_out)
    return [out.detach(), grad_queries, *grad_keys_values.unbind(1)]


def rows_of_attention(tensors: list[Tensor], lengths: list[int], p: float, scale: float | None = None) -> list[Tensor]:
    """The same from attention of all tokens, whose other queries change nothing."""
    queries, keys_values, grad_out = tensors
    bounds = stream(lengths)
    first, tokens = bounds[:-1].long(), len(keys_values)
    all_queries = randn(tokens, *queries.shape[1:], seed=9).to(queries.dtype).index_copy(0, first, queries)
    qkv = torch.cat((all_queries[:, None], keys_values), 1).requires_grad_()
    drop = {"dropout_p": p, "seed": SEED, "stream_id": STREAM_ID, "softmax_scale": scale}
    out = attention(qkv, bounds, max(lengths), **drop)
    (grad,) = torch.autograd.grad(out, qkv, torch.zeros_like(out).index_copy(0, first, grad_out))
    return [out.detach()[first], grad[:, 0][first], grad[:, 1], grad[:, 2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("heads", "head_dim", "scale"), [(12, 32, None), (3, 64, -0.3), (2, 128, None), (5, 8, 1.0)])
def test_is_as_near_to_float64_as_the_reference(
    isa: str, record, heads: int, head_dim: int, scale: float | None, p: float, dtype: torch.dtype
) -> None:
    tensors = inputs(LENGTHS, heads, head_dim, dtype)
    with record() as ops:
        ours = run(tensors, LENGTHS, p, scale)
    assert [op for op in ops if op in OPS] == OPS
    with use_backend("reference"):
        theirs = run(tensors, LENGTHS, p, scale)
        exact = run([tensor.double() for tensor in tensors], LENGTHS, p, scale)
    for got, reference, wanted in zip(ours, theirs, exact, strict=True):
        assert got.dtype == dtype
        noise = 1e-7 * wanted.norm().item() + 1e-9 * math.sqrt(wanted.numel())
        assert (got.double() - wanted).norm() <= 2 * (reference.double() - wanted).norm() + noise


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_reference_is_attentions_rows(p: float) -> None:
    tensors = inputs(LENGTHS, 5, 12, torch.float64)
    for got, wanted in zip(run(tensors, LENGTHS, p), rows_of_attention(tensors, LENGTHS, p), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_drops_what_attention_drops(isa: str, dtype: torch.dtype) -> None:
    """With equal scores and each token's position as its value, a result tells which probabilities were kept."""
    lengths, heads, head_dim = [40, 1, 7], 5, 48
    queries, keys_values, grad_out = inputs(lengths, heads, head_dim, dtype)
    positions = torch.cat([torch.eye(head_dim, dtype=dtype)[:n] for n in lengths])
    keys_values[:, 1] = positions[:, None]
    tensors = [torch.zeros_like(queries), keys_values, grad_out]
    got, wanted = run(tensors, lengths, 0.5)[0], rows_of_attention(tensors, lengths, 0.5)[0]
    assert torch.equal(got != 0, wanted != 0)
    assert 0.3 < (got[0, :, :40] != 0).float().mean() < 0.7


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_same_bits_for_any_thread_count_and_layout(isa: str, dtype: torch.dtype) -> None:
    queries, keys_values, grad_out = inputs(LENGTHS, 12, 32, dtype)
    torch.set_num_threads(1)
    once = run([queries, keys_values, grad_out], LENGTHS, 0.3)
    torch.set_num_threads(3)
    apart = [queries.transpose(0, 1).contiguous().transpose(0, 1), keys_values, grad_out[..., None].squeeze(-1)]
    apart[1] = torch.cat((keys_values, keys_values), 1)[:, :2]
    for got, wanted in zip(run(apart, LENGTHS, 0.3), once, strict=True):
        assert torch.equal(got, wanted)


def test_what_is_not_a_number_stays_in_its_sequence(isa: str) -> None:
    tensors = inputs([4, 3, 5], 2, 16, torch.float32)
    tensors[1][5] = math.nan
    out, grad_queries, *_ = run(tensors, [4, 3, 5], 0.0)
    for result in (out, grad_queries):
        assert torch.equal(result.isnan().flatten(1).all(1), torch.tensor([False, True, False]))


def test_nothing_unwritten_is_left(isa: str) -> None:
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        results = run(inputs(LENGTHS, 3, 24, torch.float32), LENGTHS, 0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(result.isnan().any() for result in results)


@pytest.mark.parametrize(
    ("bounds", "max_seqlen", "message"),
    [
        ([0, 2, 5], 2, "max_seqlen is 2, but the longest sequence has 3 tokens"),
        ([0, 2, 4], 3, "cu_seqlens must end at the number of tokens, 5, got 4"),
        ([0, 0, 5], 5, "cu_seqlens must increase"),
        ([0, 5], 5, "cu_seqlens must have 3 entries"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lengths_that_do_not_fit_are_refused(backend: str, bounds: list[int], max_seqlen: int, message: str) -> None:
    queries, keys_values, _ = inputs([2, 3], 2, 16, torch.float32)
    with use_backend(backend), pytest.raises(ValueError, match=message):
        first_token_attention(queries, keys_values, torch.tensor(bounds, dtype=torch.int32), max_seqlen)


def test_other_head_dimensions_run_the_reference(record, needs_native: None) -> None:
    tensors = inputs([2, 3], 2, 12, torch.float32)
    with record() as ops:
        run(tensors, [2, 3], 0.0)
    assert not set(ops) & set(OPS)
    assert native.available()
