"""Attention of each sequence's first token, forward and backward.

A program is one head of one sequence. It goes over the sequence's keys and values once, in the backward twice, the
second time from the L2 cache; memory bounds it: BERT-base's 8192 tokens in bfloat16 are 25 MB of keys and values, at
least 8 us at 3.35 TB/s, and as much again for their gradients.
"""

# mypy: disable-error-code="assignment, misc"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..attention_plan import AttentionProblem
from . import philox

LOG2_E = tl.constexpr(math.log2(math.e))
KEYS = 32  # of a block
# Left alone, ptxas may spill registers to get by with 96.
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True, "maxnreg": 128}


@triton.jit
def _head(x, row, head, heads, D: tl.constexpr, PAD: tl.constexpr):
    """One head [PAD] of a row of x [S, H, d], in float32."""
    column = tl.arange(0, PAD)
    return tl.load(x + (row * heads + head) * D + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def _tile(keys, first, size, part, head, heads, D: tl.constexpr, PAD: tl.constexpr):
    """Where the keys (part 0) or values (1) of these positions lie in [N, 2, H, d], and which elements exist."""
    column = tl.arange(0, PAD)[None, :]
    at = (((first + keys).to(tl.int64)[:, None] * 2 + part) * heads + head) * D + column
    return at, (keys < size)[:, None] & (column < D)


@triton.jit
def _factors(seed, stream_id, threshold, keep_scale, row, keys, head, DROPOUT: tl.constexpr):
    """What dropout multiplies the probabilities of these keys by."""
    if DROPOUT:
        seed, number = philox.seeded(seed, row)
        word = philox.word(seed, keys, number, head // 4, stream_id, head % 4)
        return tl.where(word >= tl.cast(threshold, tl.uint32), keep_scale, 0.0)
    else:
        return tl.full(keys.shape, 1.0, tl.float32)


@triton.jit
def _scores(query, k, keys, size, scale):
    """In units of log(2); -inf beyond the sequence."""
    return tl.where(keys < size, tl.sum(k.to(tl.float32) * query[None, :], 1) * (scale * LOG2_E), float("-inf"))


@triton.jit(do_not_specialize=["stream_id", "threshold"])
def forward_kernel(
    queries, keys_values, out, cu_seqlens, seed, stream_id, threshold, keep_scale, scale, heads,
    D: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(cu_seqlens + sequence)
    size = tl.load(cu_seqlens + sequence + 1) - first
    query = _head(queries, sequence, head, heads, D, PAD)
    highest, total, mixed = float("-inf"), 0.0, tl.zeros([PAD], tl.float32)
    for block in tl.range(0, tl.cdiv(size, KEYS)):
        keys = block * KEYS + tl.arange(0, KEYS)
        key_at, mask = _tile(keys, first, size, 0, head, heads, D, PAD)
        value_at, _ = _tile(keys, first, size, 1, head, heads, D, PAD)
        scores = _scores(query, tl.load(keys_values + key_at, mask=mask, other=0.0), keys, size, scale)
        before, highest = highest, tl.maximum(highest, tl.max(scores, 0))
        p, shrink = tl.exp2(scores - highest), tl.exp2(before - highest)
        total = total * shrink + tl.sum(p, 0)
        p *= _factors(seed, stream_id, threshold, keep_scale, first, keys, head, DROPOUT)
        v = tl.load(keys_values + value_at, mask=mask, other=0.0).to(tl.float32)
        mixed = mixed * shrink + tl.sum(p[:, None] * v, 0)
    column = tl.arange(0, PAD)
    tl.store(out + (sequence * heads + head) * D + column, (mixed / total).to(out.dtype.element_ty), mask=column < D)


@triton.jit(do_not_specialize=["stream_id", "threshold"])
def backward_kernel(
    grad_out, queries, keys_values, grad_queries, grad_keys_values, cu_seqlens, seed, stream_id, threshold,
    keep_scale, scale, heads,
    D: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(cu_seqlens + sequence)
    size = tl.load(cu_seqlens + sequence + 1) - first
    query, d_out = _head(queries, sequence, head, heads, D, PAD), _head(grad_out, sequence, head, heads, D, PAD)
    highest, total, weighted = float("-inf"), 0.0, 0.0
    for block in tl.range(0, tl.cdiv(size, KEYS)):
        keys = block * KEYS + tl.arange(0, KEYS)
        key_at, mask = _tile(keys, first, size, 0, head, heads, D, PAD)
        value_at, _ = _tile(keys, first, size, 1, head, heads, D, PAD)
        scores = _scores(query, tl.load(keys_values + key_at, mask=mask, other=0.0), keys, size, scale)
        v = tl.load(keys_values + value_at, mask=mask, other=0.0).to(tl.float32)
        d_p = tl.sum(v * d_out[None, :], 1)
        d_p *= _factors(seed, stream_id, threshold, keep_scale, first, keys, head, DROPOUT)
        before, highest = highest, tl.maximum(highest, tl.max(scores, 0))
        p, shrink = tl.exp2(scores - highest), tl.exp2(before - highest)
        total = total * shrink + tl.sum(p, 0)
        weighted = weighted * shrink + tl.sum(p * d_p, 0)
    d_query = tl.zeros([PAD], tl.float32)
    for block in tl.range(0, tl.cdiv(size, KEYS)):
        keys = block * KEYS + tl.arange(0, KEYS)
        key_at, mask = _tile(keys, first, size, 0, head, heads, D, PAD)
        value_at, _ = _tile(keys, first, size, 1, head, heads, D, PAD)
        k = tl.load(keys_values + key_at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(keys_values + value_at, mask=mask, other=0.0).to(tl.float32)
        factors = _factors(seed, stream_id, threshold, keep_scale, first, keys, head, DROPOUT)
        p = tl.exp2(_scores(query, k, keys, size, scale) - highest) / total
        d_scores = p * (tl.sum(v * d_out[None, :], 1) * factors - weighted / total) * scale
        d_query += tl.sum(d_scores[:, None] * k, 0)
        dtype = grad_keys_values.dtype.element_ty
        tl.store(grad_keys_values + key_at, (d_scores[:, None] * query[None, :]).to(dtype), mask=mask)
        tl.store(grad_keys_values + value_at, ((p * factors)[:, None] * d_out[None, :]).to(dtype), mask=mask)
    column = tl.arange(0, PAD)
    tl.store(
        grad_queries + (sequence * heads + head) * D + column,
        d_query.to(grad_queries.dtype.element_ty),
        mask=column < D,
    )


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _launch(kernel: Any, problem: AttentionProblem, queries: Tensor, *tensors: Tensor) -> None:
    sequences, heads, head_dim = queries.shape
    threshold = reference.drop_threshold(problem.dropout_p)
    arguments = {
        "cu_seqlens": problem.cu_seqlens,
        "seed": problem.seed,
        "stream_id": problem.stream_id - (problem.stream_id >> 31 << 32),
        "threshold": threshold - (threshold >> 31 << 32),
        "keep_scale": 1 / (1 - problem.dropout_p),
        "scale": problem.scale,
        "heads": heads,
    }
    constants = {"D": head_dim, "PAD": padded(head_dim), "KEYS": KEYS, "DROPOUT": problem.seed is not None}
    with torch.cuda.device_of(queries):
        kernel[(sequences, heads)](*tensors, **arguments, **constants, **OPTIONS)


def attention(queries: Tensor, problem: AttentionProblem) -> Tensor:
    """The result [S, H, d]; all tensors are contiguous."""
    out = torch.empty_like(queries)
    _launch(forward_kernel, problem, queries, queries, problem.qkv, out)
    return out


def attention_backward(grad_out: Tensor, queries: Tensor, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The gradients of queries, and of keys and values."""
    grads = torch.empty_like(queries), torch.empty_like(problem.qkv)
    _launch(backward_kernel, problem, queries, grad_out, queries, problem.qkv, *grads)
    return grads
