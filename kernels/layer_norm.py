"""Dropout, residual and layer norm: what follows each half of a BERT layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls, reference, task_views
from .autograd import first_order_only
from .dispatch import is_compiled
from .dropout import mask_like
from .flight_recorder import recorded
from .native import library


@torch.library.custom_op("minbert::dropout_add_layer_norm", mutates_args=(), device_types="cpu")
@recorded("dropout_add_layer_norm")
def _layer_norm(
    x: Tensor,
    residual: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[int],
    eps: float,
    p: float,
    seed: Tensor | None,
    stream_id: int,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, scratch = torch.empty_like(x), native_calls.row_scratch(*x.shape)
    mean_rstd = torch.empty(x.shape[0], 2, dtype=torch.float32)
    library().layer_norm_forward(
        native_calls.activation(x),
        x.data_ptr(),
        residual.data_ptr(),
        weights[0].data_ptr(),
        biases[0].data_ptr(),
        eps,
        native_calls.dropout(p, seed, stream_id, rows=dropout_rows),
        y.data_ptr(),
        mean_rstd.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return y, mean_rstd


@_layer_norm.register_kernel("cuda")
@recorded("dropout_add_layer_norm")
def _(
    x: Tensor, residual: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], _: Sequence[int], *others: Any
) -> tuple[Tensor, Tensor]:
    from .triton import layer_norm

    with torch.cuda.device(x.device):
        return layer_norm.forward(x, residual, weights[0], biases[0], *others)


@_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weights: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weights[0].new_empty(x.shape[0], 2)


@torch.library.custom_op("minbert::dropout_add_layer_norm_backward", mutates_args=(), device_types="cpu")
@recorded("dropout_add_layer_norm_backward")
def _layer_norm_backward(
    d_y: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean_rstd: Tensor,
    bounds: Sequence[int],
    p: float,
    seed: Tensor | None,
    stream_id: int,
    dropout_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of residual, and of the T weights and biases, [T, 2, D].

    Without dropout the gradient of x is empty: it is the residual's.
    """
    d_x = torch.empty_like(x) if reference.drop_threshold(p) else x.new_empty(0)
    d_residual = torch.empty_like(x)
    d_params = weight.new_zeros(len(bounds) - 1, 2, len(weight))
    scratch = native_calls.row_scratch(task_views.longest(bounds), x.shape[1])
    for t, rows in task_views.segments(bounds):
        library().layer_norm_backward(
            native_calls.activation(x[rows]),
            d_y[rows].data_ptr(),
            x[rows].data_ptr(),
            residual[rows].data_ptr(),
            weight.data_ptr(),
            mean_rstd[rows].data_ptr(),
            native_calls.dropout(p, seed, stream_id, rows.start, dropout_rows),
            d_x[rows].data_ptr(),
            d_residual[rows].data_ptr(),
            d_params[t, 0].data_ptr(),
            d_params[t, 1].data_ptr(),
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
    return d_x, d_residual, d_params


@_layer_norm_backward.register_kernel("cuda")
@recorded("dropout_add_layer_norm_backward")
def _(d_y: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .triton import layer_norm

    with torch.cuda.device(d_y.device):
        return layer_norm.backward(d_y, *others)


@_layer_norm_backward.register_fake
def _(
    d_y: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean_rstd: Tensor,
    bounds: Sequence[int],
    p: float,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = torch.empty_like(x) if reference.drop_threshold(p) else x.new_empty(0)
    return d_x, torch.empty_like(x), weight.new_empty(len(bounds) - 1, 2, weight.shape[0])


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, residual, weights, _, ctx.bounds, _, ctx.p, seed, ctx.stream_id, dropout_rows = inputs
    mean_rstd = output[1]
    ctx.mark_non_differentiable(mean_rstd)
    ctx.save_for_backward(x, residual, weights[0], mean_rstd, seed, dropout_rows)


def _gradients(ctx, d_y: Tensor, *_: Tensor) -> tuple:
    x, residual, weight, mean_rstd, seed, dropout_rows = ctx.saved_tensors
    d_x, d_residual, d_params = _layer_norm_backward(
        d_y.contiguous(), x, residual, weight, mean_rstd, ctx.bounds, ctx.p, seed, ctx.stream_id, dropout_rows
    )
    d_weights, d_biases = (list(of_param.unbind()) for of_param in d_params.unbind(1))
    return d_x if d_x.numel() else d_residual, d_residual, d_weights, d_biases, *(None,) * 6


_layer_norm.register_autograd(_gradients, setup_context=_save)
first_order_only(_layer_norm_backward, "dropout_add_layer_norm")


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: task_views.Parameter,
    bias: task_views.Parameter,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream_id: int = 0,
    bounds: Sequence[int] | None = None,
    dropout_rows: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension.

    Args:
        x, residual: float [N, D], of one dtype.
        weight, bias: float [D], or T views of each.
        eps: added to the variance.
        dropout_p, seed, stream_id: as for `dropout_mask`; `seed` is needed when dropout_p > 0.
        bounds: T + 1 numbers: view t gets the gradient of rows bounds[t] to bounds[t + 1].
        dropout_rows: int32 [N], for some rows of a larger activation: their numbers in it, of which their masks depend.

    Returns:
        [N, D], of x's dtype.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "dropout_add_layer_norm"
    checks.tensor(op, "x", x, ["N", "D"], checks.FLOATS)
    checks.tensor(op, "residual", residual, x.shape, [x.dtype], like=x)
    (weights, biases), bounds = task_views.views(op, x.shape[0], bounds, weight=weight, bias=bias)
    checks.tensor(op, "weight", weights[0], x.shape[1:], checks.FLOATS, like=x)
    checks.tensor(op, "bias", biases[0], x.shape[1:], checks.FLOATS, like=x)
    seed = checks.dropout(op, dropout_p, seed, stream_id, x.device)
    if dropout_rows is not None:
        checks.tensor(op, "dropout_rows", dropout_rows, x.shape[:1], [torch.int32], like=x)
    if is_compiled(op, x.device, x.dtype, columns=x.shape[1]):
        wide = [[view.float() for view in views] for views in (weights, biases)]
        return _layer_norm(x, residual, *wide, bounds, eps, dropout_p, seed, stream_id, dropout_rows)[0]
    keep = mask_like(x, dropout_p, seed, stream_id, dropout_rows)

    def of_task(t: int, rows: slice) -> Tensor:
        kept = None if keep is None else keep[rows]
        return reference.dropout_add_layer_norm(x[rows], residual[rows], weights[t], biases[t], kept, dropout_p, eps)

    return task_views.by_segment(bounds, of_task)
