"""Attention within each sequence of a packed stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls, reference
from .attention_plan import AttentionPlan, AttentionProblem
from .autograd import first_order_only
from .dispatch import is_compiled
from .dropout import attention_dropout_mask
from .flight_recorder import recorded
from .native import library


def _scratch(native: Any, backward: bool, threads: int) -> Tensor:
    return torch.empty(native.scratch(backward, threads), dtype=torch.uint8)


def _check_lengths(problem: AttentionProblem) -> None:
    checks.cu_seqlens_values("attention", problem.cu_seqlens, problem.qkv.shape[0], problem.max_seqlen)


_PROBLEM = (  # AttentionProblem
    "Tensor qkv, Tensor cu_seqlens, int max_seqlen, float dropout_p, Tensor? seed, int stream_id, float scale, "
    "Tensor? tile_bounds, Tensor? starts"
)


def _kept_for_backward(qkv: Tensor, max_seqlen: int, dropout_p: float) -> Tensor:
    """Memory for dropout's bits, keep_bytes of csrc/kernels.h for each token and head; zeros where none belongs."""
    if dropout_p == 0:
        return qkv.new_empty(0, dtype=torch.uint8)
    longest = torch.sym_min(max_seqlen, qkv.shape[0])
    return qkv.new_zeros(qkv.shape[0], qkv.shape[2], (longest + 15) // 16 * 2, dtype=torch.uint8)


@torch.library.custom_op(
    "minbert::attention", mutates_args=(), device_types="cpu", schema=f"({_PROBLEM}) -> (Tensor, Tensor)"
)
@recorded("attention")
def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The result, and what the backward reads: dropout's bits, on GPUs a number for each token and head."""
    problem = AttentionProblem(*arguments)
    qkv, native, threads = problem.qkv, native_calls.attention_problem(problem), torch.get_num_threads()
    keep = _kept_for_backward(qkv, problem.max_seqlen, problem.dropout_p)
    out = qkv.new_empty(qkv.shape[0], qkv.shape[2], qkv.shape[3])
    scratch = _scratch(native, False, threads)
    addresses = out.data_ptr(), native_calls.address(keep if problem.dropout_p > 0 else None), scratch.data_ptr()
    if not library().attention(native, qkv.data_ptr(), qkv.stride(), *addresses, threads):
        _check_lengths(problem)
    return out, keep


@_attention.register_kernel("cuda")
@recorded("attention")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from .triton import attention as kernels

    return kernels.attention(AttentionProblem(*arguments))


@_attention.register_fake
def _(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, *others: Any) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(tokens, heads, head_dim)
    if qkv.device.type == "cuda":
        return out, qkv.new_empty(heads, tokens, dtype=torch.float32)
    return out, _kept_for_backward(qkv, max_seqlen, dropout_p)


@torch.library.custom_op(
    "minbert::attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad_out, {_PROBLEM}, Tensor? out, Tensor? kept) -> Tensor",
)
@recorded("attention_backward")
def _attention_backward(grad_out: Tensor, *arguments: Any) -> Tensor:
    """`out` and `kept` are the forward's results; without the latter, a CPU draws dropout's bits again."""
    problem, keep = AttentionProblem(*arguments[:-2]), arguments[-1]
    qkv, native, threads = problem.qkv, native_calls.attention_problem(problem), torch.get_num_threads()
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    if grad_out.stride(2) != 1:
        grad_out = grad_out.contiguous()
    scratch = _scratch(native, True, threads)
    if not library().attention_backward(
        native,
        grad_out.data_ptr(),
        grad_out.stride(),
        qkv.data_ptr(),
        qkv.stride(),
        native_calls.address(keep),
        grad_qkv.data_ptr(),
        scratch.data_ptr(),
        threads,
    ):
        _check_lengths(problem)
    return grad_qkv


@_attention_backward.register_kernel("cuda")
@recorded("attention_backward")
def _(grad_out: Tensor, *arguments: Any) -> Tensor:
    from .triton import attention as kernels

    grad_out = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
    *problem, out, lse = arguments
    return kernels.attention_backward(grad_out, AttentionProblem(*problem), out, lse)


@_attention_backward.register_fake
def _(grad_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed, ctx.stream_id, ctx.scale, *plan = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    kept = output if qkv.device.type == "cuda" else (None, output[1] if ctx.dropout_p > 0 else None)
    ctx.save_for_backward(qkv, cu_seqlens, seed, *plan, *kept)


def _gradients(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    qkv, cu_seqlens, seed, *kept = ctx.saved_tensors
    problem = (qkv, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed, ctx.stream_id, ctx.scale)
    return _attention_backward(grad_out, *problem, *kept), *(None,) * 8


_attention.register_autograd(_gradients, setup_context=_save)
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
    to 128; the reference runs for others. The backward computes the scores again. A CPU keeps for it, besides the
    arguments, which probabilities are dropped: max_seqlen bits for each token and head. A GPU keeps the result and one
    number for each token and head, and computes the masks again.

    Sums are float32. On a processor that multiplies bfloat16 (`native.isa()` is avx512bf16), the probabilities and the
    gradients of the scores are rounded to bfloat16 for their products, in sequences of more than 16 tokens whose
    head dimension is a multiple of 32, unless softmax_scale is 0.

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
    checks.cu_seqlens_shape("attention", cu_seqlens)
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"attention: cu_seqlens must be on {qkv.device} like qkv, got {cu_seqlens.device}")
    if plan is not None:
        checks.tensor("attention", "plan.tile_bounds", plan[0], ["tiles", 2], [torch.int32], like=qkv)
        checks.tensor("attention", "plan.starts", plan[1], [qkv.shape[0]], [torch.int32], like=qkv)
    scale = qkv.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if is_compiled("attention", qkv.device, qkv.dtype, head_dim=qkv.shape[3]):
        return _attention(qkv, cu_seqlens, max_seqlen, dropout_p, seed, stream_id, scale, *(plan or (None, None)))[0]
    checks.cu_seqlens("attention", cu_seqlens, qkv.shape[0], max_seqlen)
    keep = None if seed is None else attention_dropout_mask(cu_seqlens, qkv.shape[2], dropout_p, seed, stream_id)
    return reference.attention(qkv, cu_seqlens, keep, dropout_p, scale)
