"""Attention of each sequence's first token: all that pooling by it reads of the last layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls, reference
from .attention_plan import AttentionProblem
from .autograd import first_order_only
from .dispatch import is_compiled
from .dropout import attention_dropout_mask
from .flight_recorder import recorded
from .native import library

_PROBLEM = (
    "Tensor queries, Tensor keys_values, Tensor cu_seqlens, int max_seqlen, float dropout_p, Tensor? seed, "
    "int stream_id, float scale"
)


def _run(name: str, problem: AttentionProblem, *tensors: Tensor) -> None:
    native = native_calls.attention_problem(problem)
    scratch = torch.empty(native.first_token_scratch(), dtype=torch.float32)
    addresses = [tensor.data_ptr() for tensor in (*tensors, scratch)]
    if not getattr(library(), name)(native, *addresses, torch.get_num_threads()):
        checks.cu_seqlens_values("first_token_attention", problem.cu_seqlens, problem.qkv.shape[0], problem.max_seqlen)


@torch.library.custom_op(
    "minbert::first_token_attention", mutates_args=(), device_types="cpu", schema=f"({_PROBLEM}) -> Tensor"
)
@recorded("first_token_attention")
def _attention(queries: Tensor, *problem: Any) -> Tensor:
    out = torch.empty_like(queries)
    _run("first_token_attention", AttentionProblem(*problem), queries, problem[0], out)
    return out


@_attention.register_kernel("cuda")
@recorded("first_token_attention")
def _(queries: Tensor, *problem: Any) -> Tensor:
    from .triton import first_token_attention as kernels

    return kernels.attention(queries, AttentionProblem(*problem))


@_attention.register_fake
def _(queries: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(queries)


@torch.library.custom_op(
    "minbert::first_token_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad_out, {_PROBLEM}) -> (Tensor, Tensor)",
)
@recorded("first_token_attention_backward")
def _attention_backward(grad_out: Tensor, queries: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    problem = AttentionProblem(*arguments)
    grads = torch.empty_like(queries), torch.empty_like(problem.qkv)
    _run("first_token_attention_backward", problem, grad_out, queries, problem.qkv, *grads)
    return grads


@_attention_backward.register_kernel("cuda")
@recorded("first_token_attention_backward")
def _(grad_out: Tensor, queries: Tensor, *problem: Any) -> tuple[Tensor, Tensor]:
    from .triton import first_token_attention as kernels

    return kernels.attention_backward(grad_out, queries, AttentionProblem(*problem))


@_attention_backward.register_fake
def _(grad_out: Tensor, queries: Tensor, keys_values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(keys_values)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    queries, keys_values, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed, ctx.stream_id, ctx.scale = inputs
    ctx.save_for_backward(queries, keys_values, cu_seqlens, seed)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    queries, keys_values, cu_seqlens, seed = ctx.saved_tensors
    problem = (keys_values, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed, ctx.stream_id, ctx.scale)
    return *_attention_backward(grad_out.contiguous(), queries, *problem), *(None,) * 6


_attention.register_autograd(_gradients, setup_context=_save)
first_order_only(_attention_backward, "first_token_attention")


def first_token_attention(
    queries: Tensor,
    keys_values: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream_id: int = 0,
    softmax_scale: float | None = None,
) -> Tensor:
    """Softmax attention of each sequence's first token to its sequence: rows cu_seqlens[:-1] of `attention`.

    It drops the probabilities that `attention` drops for these tokens, and takes what that takes.

    Args:
        queries: float [S, H, d], of the first tokens.
        keys_values: float [N, 2, H, d], the keys and values of all tokens, of queries' dtype.
        cu_seqlens: int32 [S + 1], cumulative sequence lengths from 0 to N.
        max_seqlen: the longest sequence's length in tokens.
        dropout_p: the probability of dropping an attention probability, in [0, 1).
        seed, stream_id: as for `attention_dropout_mask`; needed when dropout_p > 0.
        softmax_scale: what the scores are multiplied by; 1 / sqrt(d) when left out.

    Returns:
        [S, H, d].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "first_token_attention"
    checks.tensor(op, "queries", queries, ["S", "H", "d"], checks.FLOATS, contiguous=False)
    sequences, heads, head_dim = queries.shape
    shape: list[int | str] = ["N", 2, heads, head_dim]
    checks.tensor(op, "keys_values", keys_values, shape, [queries.dtype], like=queries, contiguous=False)
    seed = checks.dropout(op, dropout_p, seed, stream_id, queries.device)
    checks.cu_seqlens_shape(op, cu_seqlens)
    if cu_seqlens.device != queries.device:
        raise ValueError(f"{op}: cu_seqlens must be on {queries.device} like queries, got {cu_seqlens.device}")
    if cu_seqlens.shape[0] != sequences + 1:
        raise ValueError(
            f"{op}: cu_seqlens must have {sequences + 1} entries, one more than queries has rows, got "
            f"{cu_seqlens.shape[0]}"
        )
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if is_compiled(op, queries.device, queries.dtype, head_dim=head_dim):
        problem = (cu_seqlens, max_seqlen, dropout_p, seed, stream_id, scale)
        return _attention(queries.contiguous(), keys_values.contiguous(), *problem)
    checks.cu_seqlens(op, cu_seqlens, keys_values.shape[0], max_seqlen)
    keep = None if seed is None else attention_dropout_mask(cu_seqlens, heads, dropout_p, seed, stream_id)
    return reference.first_token_attention(queries, keys_values, cu_seqlens, keep, dropout_p, scale)
