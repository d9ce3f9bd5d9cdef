"""Dropout masks from Philox4x32-7: every backend drops the same elements, for any blocks and threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls, reference
from .dispatch import is_compiled
from .flight_recorder import recorded


@torch.library.custom_op("minbert::dropout_mask", mutates_args=(), device_types=("cpu", "cuda"))
@recorded("dropout_mask")
def _dropout_mask(rows: int, columns: int, threshold: int, seed: Tensor, stream_id: int) -> Tensor:
    keep = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    addresses = keep.data_ptr(), rows, columns, seed.data_ptr()
    native_calls.run("dropout_mask", seed.device, *addresses, threshold, stream_id)
    return keep


@_dropout_mask.register_fake
def _(rows: int, columns: int, threshold: int, seed: Tensor, stream_id: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bool, device=seed.device)


@torch.library.custom_op("minbert::attention_dropout_mask", mutates_args=(), device_types="cpu")
@recorded("attention_dropout_mask")
def _attention_dropout_mask(cu_seqlens: Tensor, heads: int, threshold: int, seed: Tensor, stream_id: int) -> Tensor:
    keep = torch.empty(heads * int(cu_seqlens.diff().long().square().sum()), dtype=torch.bool)
    sequences = cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1
    stream = seed.data_ptr(), threshold, stream_id
    native_calls.run("attention_dropout_mask", seed.device, keep.data_ptr(), *sequences, heads, *stream)
    return keep


@_attention_dropout_mask.register_fake
def _(cu_seqlens: Tensor, heads: int, threshold: int, seed: Tensor, stream_id: int) -> Tensor:
    probabilities = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(probabilities, dtype=torch.bool, device=seed.device)


@torch.library.custom_op("minbert::dropout", mutates_args=(), device_types="cpu")
@recorded("dropout")
def _dropout(x: Tensor, p: float, seed: Tensor, stream_id: int) -> Tensor:
    y, scratch = torch.empty_like(x), native_calls.row_scratch(*x.shape)
    shape, drop = native_calls.activation(x), native_calls.dropout(p, seed, stream_id)
    native_calls.run("dropout_forward", x.device, shape, x.data_ptr(), y.data_ptr(), drop, scratch.data_ptr())
    return y


@_dropout.register_kernel("cuda")
@recorded("dropout")
def _(x: Tensor, *others: Any) -> Tensor:
    from .triton import dropout

    with torch.cuda.device(x.device):
        return dropout.dropout(x, *others)


@_dropout.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _save(ctx, inputs: tuple[Tensor, float, Tensor, int], output: Tensor) -> None:
    _, ctx.p, seed, ctx.stream_id = inputs
    ctx.save_for_backward(seed)


def _gradients(ctx, d_y: Tensor) -> tuple[Tensor, None, None, None]:
    (seed,) = ctx.saved_tensors
    return _dropout(d_y.contiguous(), ctx.p, seed, ctx.stream_id), None, None, None  # it is linear: its own gradient


_dropout.register_autograd(_gradients, setup_context=_save)


def dropout_mask(rows: int, columns: int, p: float, seed: Tensor, stream_id: int) -> Tensor:
    """Which elements of a [rows, columns] activation dropout keeps: bool, on the seed's device.

    Args:
        p: the probability of dropping an element, in [0, 1).
        seed: int64 scalar tensor, the same for a whole step; or int64 [2], the seed and the number of the first row.
            Rows from a to b of a larger activation draw with [seed, a] what they draw in the whole of it with `seed`.
            Both numbers are read where the op runs, so no host waits for them. Rows are numbered modulo 2**32.
        stream_id: which dropout of the model this is, so that no two share their random numbers.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.probability("dropout_mask", p)
    seed = checks.stream("dropout_mask", seed, stream_id, None)
    if rows < 1 or columns < 1:
        raise ValueError(f"dropout_mask: rows and columns must be at least 1, got {rows} and {columns}")
    if is_compiled("dropout_mask", seed.device):
        return _dropout_mask(rows, columns, reference.drop_threshold(p), seed, stream_id)
    return reference.dropout_mask(rows, columns, p, seed, stream_id)


def attention_dropout_mask(cu_seqlens: Tensor, heads: int, p: float, seed: Tensor, stream_id: int) -> Tensor:
    """Which attention probabilities dropout keeps: bool, one [heads, length, length] block per sequence, end to end.

    Args:
        cu_seqlens: int32 [S + 1], cumulative sequence lengths from 0.
        heads: attention heads.
        p, seed, stream_id: as for `dropout_mask`. Queries are its rows; keys are numbered within their own sequence.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.probability("attention_dropout_mask", p)
    checks.cu_seqlens("attention_dropout_mask", cu_seqlens)
    seed = checks.stream("attention_dropout_mask", seed, stream_id, cu_seqlens.device)
    if heads < 1:
        raise ValueError(f"attention_dropout_mask: heads must be at least 1, got {heads}")
    if is_compiled("attention_dropout_mask", seed.device):
        return _attention_dropout_mask(cu_seqlens, heads, reference.drop_threshold(p), seed, stream_id)
    return reference.attention_dropout_mask(cu_seqlens, heads, p, seed, stream_id)


def mask_like(x: Tensor, p: float, seed: Tensor | None, stream_id: int, rows: Tensor | None = None) -> Tensor | None:
    """The mask for an activation [N, D], or for rows of one with these numbers, int32 [N]; None without a seed.

    The arguments have been checked.
    """
    if seed is None or rows is None:
        return None if seed is None else dropout_mask(x.shape[0], x.shape[1], p, seed, stream_id)
    return reference.dropout_mask(rows, x.shape[1], p, seed, stream_id)


def dropout(x: Tensor, *, p: float, seed: Tensor | None, stream_id: int) -> Tensor:
    """Inverted dropout of an activation: zeros with probability p, the rest scaled by 1 / (1 - p).

    Args:
        x: float [N, D].
        p, seed, stream_id: as for `dropout_mask`; `seed` may be None when p is 0.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("dropout", "x", x, ["N", "D"], checks.FLOATS, contiguous=False)
    seed = checks.dropout("dropout", p, seed, stream_id, x.device)
    if seed is not None and is_compiled("dropout", x.device, x.dtype, columns=x.shape[1]):
        return _dropout(x.contiguous(), p, seed, stream_id)
    return reference.dropout(x, mask_like(x, p, seed, stream_id), p)
