"""Dropout, residual and layer norm: what follows each half of a BERT layer."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference, rowwise
from .autograd import first_order_only
from .dispatch import runs_native
from .native import library
from .random import mask_like


@torch.library.custom_op("minbert::dropout_add_layer_norm", mutates_args=(), device_types="cpu")
def _layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    y, scratch = torch.empty_like(x), rowwise.scratch(x)
    moments = torch.empty(x.shape[0], 2, dtype=torch.float32)  # mean and 1 / standard deviation
    library().layer_norm_forward(
        rowwise.activation(x),
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        rowwise.dropout(p, seed, site),
        y.data_ptr(),
        moments.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return y, moments


@_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(x.shape[0], 2)


@torch.library.custom_op("minbert::dropout_add_layer_norm_backward", mutates_args=(), device_types="cpu")
def _layer_norm_backward(
    d_y: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    moments: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual, weight and bias; without dropout that of x is empty, for it is the residual's."""
    d_x = torch.empty_like(x) if reference.drop_threshold(p) else x.new_empty(0)
    d_residual, scratch = torch.empty_like(x), rowwise.scratch(x)
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    library().layer_norm_backward(
        rowwise.activation(x),
        d_y.data_ptr(),
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        moments.data_ptr(),
        rowwise.dropout(p, seed, site),
        d_x.data_ptr(),
        d_residual.data_ptr(),
        d_weight.data_ptr(),
        d_bias.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return d_x, d_residual, d_weight, d_bias


@_layer_norm_backward.register_fake
def _(
    d_y: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    moments: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x = torch.empty_like(x) if reference.drop_threshold(p) else x.new_empty(0)
    return d_x, torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, _, _, ctx.p, seed, ctx.site = inputs
    moments = output[1]
    ctx.mark_non_differentiable(moments)
    ctx.save_for_backward(x, residual, weight, moments, seed)


def _gradients(ctx, d_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, weight, moments, seed = ctx.saved_tensors
    d_x, d_residual, d_weight, d_bias = _layer_norm_backward(
        d_y.contiguous(), x, residual, weight, moments, ctx.p, seed, ctx.site
    )
    return d_x if d_x.numel() else d_residual, d_residual, d_weight, d_bias, None, None, None, None


_layer_norm.register_autograd(_gradients, setup_context=_save)
first_order_only(_layer_norm_backward, "dropout_add_layer_norm")


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension.

    Args:
        x, residual: float [N, D], of one dtype.
        weight, bias: float [D].
        eps: added to the variance.
        dropout_p, seed, site: as for `dropout_mask`; `seed` is needed when dropout_p > 0.

    Returns:
        [N, D], of x's dtype.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "dropout_add_layer_norm"
    checks.tensor(op, "x", x, ["N", "D"], checks.FLOATS)
    checks.tensor(op, "residual", residual, x.shape, [x.dtype], like=x)
    checks.tensor(op, "weight", weight, x.shape[1:], checks.FLOATS, like=x)
    checks.tensor(op, "bias", bias, x.shape[1:], checks.FLOATS, like=x)
    checks.dropout(op, dropout_p, seed, site, x.device)
    if runs_native(op, x.device) and rowwise.is_native(x.dtype):
        return _layer_norm(x, residual, weight.float(), bias.float(), eps, dropout_p, seed, site)[0]
    keep = mask_like(x, dropout_p, seed, site)
    return reference.dropout_add_layer_norm(x, residual, weight, bias, keep, dropout_p, eps)
