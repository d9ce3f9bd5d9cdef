"""Bias and GELU: what follows the first product of a feed-forward block."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference, rowwise
from .autograd import first_order_only
from .dispatch import runs_native
from .native import library


@torch.library.custom_op("minbert::bias_gelu", mutates_args=(), device_types="cpu")
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty_like(x)
    library().gelu_forward(rowwise.activation(x), x.data_ptr(), bias.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("minbert::bias_gelu_backward", mutates_args=(), device_types="cpu")
def _bias_gelu_backward(d_y: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    d_x, d_bias, scratch = torch.empty_like(x), torch.empty_like(bias), rowwise.scratch(x)
    library().gelu_backward(
        rowwise.activation(x),
        d_y.data_ptr(),
        x.data_ptr(),
        bias.data_ptr(),
        d_x.data_ptr(),
        d_bias.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return d_x, d_bias


@_bias_gelu_backward.register_fake
def _(d_y: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(bias)


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, d_y: Tensor) -> tuple[Tensor, Tensor]:
    return _bias_gelu_backward(d_y.contiguous(), *ctx.saved_tensors)


_bias_gelu.register_autograd(_gradients, setup_context=_save)
first_order_only(_bias_gelu_backward, "bias_gelu")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) with the exact error function (Hendrycks and Gimpel 2016).

    Args:
        x: float [N, D].
        bias: float [D].

    Returns:
        [N, D], of x's dtype.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("bias_gelu", "x", x, ["N", "D"], checks.FLOATS)
    checks.tensor("bias_gelu", "bias", bias, x.shape[1:], checks.FLOATS, like=x)
    if runs_native("bias_gelu", x.device) and rowwise.is_native(x.dtype):
        return _bias_gelu(x, bias.float())
    return reference.bias_gelu(x, bias)
