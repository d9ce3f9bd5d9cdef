"""Bias and GELU: what follows the first product of a feed-forward block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls, reference, task_views
from .autograd import first_order_only
from .dispatch import is_compiled
from .flight_recorder import recorded
from .native import library


@torch.library.custom_op("minbert::bias_gelu", mutates_args=(), device_types="cpu")
@recorded("bias_gelu")
def _bias_gelu(x: Tensor, biases: Sequence[Tensor], bounds: Sequence[int]) -> Tensor:
    y, bias = torch.empty_like(x), biases[0]
    library().gelu_forward(
        native_calls.activation(x), x.data_ptr(), bias.data_ptr(), y.data_ptr(), torch.get_num_threads()
    )
    return y


@_bias_gelu.register_kernel("cuda")
@recorded("bias_gelu")
def _(x: Tensor, biases: Sequence[Tensor], _: Sequence[int]) -> Tensor:
    from .triton import gelu

    with torch.cuda.device(x.device):
        return gelu.forward(x, biases[0])


@_bias_gelu.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("minbert::bias_gelu_backward", mutates_args=(), device_types="cpu")
@recorded("bias_gelu_backward")
def _bias_gelu_backward(d_y: Tensor, x: Tensor, bias: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the T biases, [T, D]."""
    d_x, d_biases = torch.empty_like(x), bias.new_zeros(len(bounds) - 1, len(bias))
    scratch = native_calls.row_scratch(task_views.longest(bounds), x.shape[1])
    for t, rows in task_views.segments(bounds):
        library().gelu_backward(
            native_calls.activation(x[rows]),
            d_y[rows].data_ptr(),
            x[rows].data_ptr(),
            bias.data_ptr(),
            d_x[rows].data_ptr(),
            d_biases[t].data_ptr(),
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
    return d_x, d_biases


@_bias_gelu_backward.register_kernel("cuda")
@recorded("bias_gelu_backward")
def _(d_y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    from .triton import gelu

    with torch.cuda.device(d_y.device):
        return gelu.backward(d_y, *others)


@_bias_gelu_backward.register_fake
def _(_: Tensor, x: Tensor, bias: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), bias.new_empty(len(bounds) - 1, bias.shape[0])


def _save(ctx, inputs: tuple[Tensor, list[Tensor], list[int]], output: Tensor) -> None:
    x, biases, ctx.bounds = inputs
    ctx.save_for_backward(x, biases[0])


def _gradients(ctx, d_y: Tensor) -> tuple[Tensor, list[Tensor], None]:
    d_x, d_biases = _bias_gelu_backward(d_y.contiguous(), *ctx.saved_tensors, ctx.bounds)
    return d_x, list(d_biases.unbind()), None


_bias_gelu.register_autograd(_gradients, setup_context=_save)
first_order_only(_bias_gelu_backward, "bias_gelu")


def bias_gelu(x: Tensor, bias: task_views.Parameter, *, bounds: Sequence[int] | None = None) -> Tensor:
    """GELU(x + bias) with the exact error function (Hendrycks and Gimpel 2016).

    Args:
        x: float [N, D].
        bias: float [D], or T views of it.
        bounds: T + 1 numbers: view t gets the gradient of rows bounds[t] to bounds[t + 1].

    Returns:
        [N, D], of x's dtype.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("bias_gelu", "x", x, ["N", "D"], checks.FLOATS)
    (biases,), bounds = task_views.views("bias_gelu", x.shape[0], bounds, bias=bias)
    checks.tensor("bias_gelu", "bias", biases[0], x.shape[1:], checks.FLOATS, like=x)
    if is_compiled("bias_gelu", x.device, x.dtype):
        return _bias_gelu(x, [bias.float() for bias in biases], bounds)
    return task_views.by_segment(bounds, lambda t, rows: reference.bias_gelu(x[rows], biases[t]))
