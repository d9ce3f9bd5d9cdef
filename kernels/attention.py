"""Attention within each sequence of a packed stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .attention_plan import AttentionPlan
from .custom_ops import first_order_only
from .dispatch import compiled
from .dropout import attention_dropout_mask
from .native import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/kernels.h's DType
_LARGEST_HEAD_DIM = 128


def _is_compiled(qkv: Tensor) -> bool:
    known = qkv.dtype in _DTYPES or (qkv.dtype == torch.float16 and qkv.device.type == "cuda")
    fits = qkv.shape[3] % 8 == 0 and qkv.shape[3] <= _LARGEST_HEAD_DIM
    return known and fits and compiled("attention", qkv.device) is not None


def _problem(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
    stream_id: int,
    scale: float,
) -> Any:
    return library().AttentionProblem(
        _DTYPES[qkv.dtype],
        cu_seqlens.data_ptr(),
        cu_seqlens.shape[0] - 1,
        qkv.shape[0],
        max_seqlen,
        qkv.shape[2],
        qkv.shape[3],
        scale,
        0 if seed is None else seed.data_ptr(),
        reference.drop_threshold(dropout_p),
        stream_id,
        1 / (1 - dropout_p),
    )


def _scratch(problem: Any, backward: bool, threads: int) -> Tensor:
    return torch.empty(problem.scratch(backward, threads), dtype=torch.uint8)


@torch.library.custom_op("minbert::attention", mutates_args=(), device_types="cpu")
def _attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
    stream_id: int,
    scale: float,
    tile_bounds: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(qkv.shape[0], qkv.shape[2], qkv.shape[3])
    problem, threads = _problem(qkv, cu_seqlens, max_seqlen, dropout_p, seed, stream_id, scale), torch.get_num_threads()
    scratch = _scratch(problem, False, threads)
    if not library().attention(problem, qkv.data_ptr(), qkv.stride(), out.data_ptr(), scratch.data_ptr(), threads):
        checks.cu_seqlens_values("attention", cu_seqlens, qkv.shape[0], max_seqlen)
    return out, qkv.new_empty(0, dtype=torch.float32)


@_attention.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from .triton import attention as kernels

    return kernels.attention(*arguments)


@_attention.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
    stream_id: int,
    scale: float,
    tile_bounds: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    statistics = (heads, tokens) if qkv.device.type == "cuda" else (0,)
    return qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(statistics, dtype=torch.float32)


@torch.library.custom_op("minbert::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
    stream_id: int,
    scale: float,
    tile_bounds: Tensor | None = None,
    starts: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    if grad_out.stride(2) != 1:
        grad_out = grad_out.contiguous()
    problem, threads = _problem(qkv, cu_seqlens, max_seqlen, dropout_p, seed, stream_id, scale), torch.get_num_threads()
    scratch = _scratch(problem, True, threads)
    if not library().attention_backward(
        problem,
        grad_out.data_ptr(),
        grad_out.stride(),
        qkv.data_ptr(),
        qkv.stride(),
        grad_qkv.data_ptr(),
        scratch.data_ptr(),
        threads,
    ):
        checks.cu_seqlens_values("attention", cu_seqlens, qkv.shape[0], max_seqlen)
    return grad_qkv


@_attention_backward.register_kernel("cuda")
def _(grad_out: Tensor, *arguments: Any) -> Tensor:
    from .triton import attention as kernels

    return kernels.attention_backward(grad_out if grad_out.stride(2) == 1 else grad_out.contiguous(), *arguments)


@_attention_backward.register_fake
def _(
    grad_out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor | None,
    stream_id: int,
    scale: float,
    tile_bounds: Tensor | None = None,
    starts: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed, ctx.stream_id, ctx.scale, *plan = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    kept = output if qkv.device.type == "cuda" else (None, None)
    ctx.save_for_backward(qkv, cu_seqlens, seed, *plan, *kept)


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    qkv, cu_seqlens, seed, *kept = ctx.saved_tensors
    problem = (qkv, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed, ctx.stream_id, ctx.scale)
    return _attention_backward(grad_out, *problem, *kept), *(None,) * 8


_attention.register_autograd(_backward, setup_context=_keep_for_backward)
first_order_only(_attention_backward, "attention")


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream_id: int = 0,
    softmax_scale: float | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Softmax attention of every token to the tokens of its own sequence (Vaswani et al. 2017, section 3.2).

    The compiled code takes float32 and bfloat16, on GPUs float16 too, with head dimensions that are multiples of 8 up
    to 128; the reference runs for others. The backward computes scores and masks again: on a CPU nothing but the
    arguments is kept for it, on a GPU the result and one number for each token and head as well.

    Args:
        qkv: float [N, 3, H, d], the tokens' queries, keys and values; the d elements of a head lie next to each other.
        cu_seqlens: int32 [S + 1], cumulative sequence lengths from 0 to N.
        max_seqlen: the longest sequence's length in tokens.
        dropout_p: the probability of dropping an attention probability, in [0, 1).
        seed, stream_id: as for `attention_dropout_mask`; needed when dropout_p > 0.
        softmax_scale: what the scores are multiplied by; 1 / sqrt(d) when left out.
        plan: `attention_plan` of the same cu_seqlens and max_seqlen, on qkv's device. A GPU is faster with it; results
            differ by rounding alone. A CPU ignores it.

    Returns:
        [N, H, d].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("attention", "qkv", qkv, ["N", 3, "H", "d"], checks.FLOATS, contiguous=False)
    if qkv.stride(3) != 1 and qkv.shape[3] > 1:
        raise ValueError(
            f"attention: qkv must be contiguous in its last dimension, got strides {list(qkv.stride())}; "
            "call .contiguous() on it"
        )
    seed = checks.dropout("attention", dropout_p, seed, stream_id, qkv.device)
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"attention: cu_seqlens must be on {qkv.device} like qkv, got {cu_seqlens.device}")
    checks.cu_seqlens_shape("attention", cu_seqlens)
    if plan is not None:
        checks.tensor("attention", "plan.tile_bounds", plan[0], ["tiles", 2], [torch.int32], like=qkv)
        checks.tensor("attention", "plan.starts", plan[1], [qkv.shape[0]], [torch.int32], like=qkv)
    scale = qkv.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if _is_compiled(qkv):
        return _attention(qkv, cu_seqlens, max_seqlen, dropout_p, seed, stream_id, scale, *(plan or (None, None)))[0]
    checks.cu_seqlens("attention", cu_seqlens, qkv.shape[0], max_seqlen)
    keep = None if seed is None else attention_dropout_mask(cu_seqlens, qkv.shape[2], dropout_p, seed, stream_id)
    return reference.attention(qkv, cu_seqlens, keep, dropout_p, scale)
