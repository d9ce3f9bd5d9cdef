"""Linear layers; on CPUs by the library that `matmul_library` chooses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, native_calls, task_views
from .autograd import first_order_only
from .dispatch import choice, is_compiled
from .flight_recorder import recorded
from .gradient_accumulation import add_bias_gradient, add_weight_gradient, is_added
from .matmul_library import by_onednn, product
from .packed_weight import PackedWeight, as_multiplied


@torch.library.custom_op("minbert::linear", mutates_args=())
@recorded("linear")
def _linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], bounds: Sequence[int]) -> Tensor:
    return _product(x, as_multiplied(weights[0], x.dtype), biases[0].to(x.dtype) if biases else None)


def _product(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, PackedWeight):
        return by_onednn(x, weight.packed, bias)
    return product(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weights: Sequence[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


@torch.library.custom_op("minbert::linear_backward", mutates_args=())
@recorded("linear_backward")
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bounds: Sequence[int],
    for_x: bool,
    for_weights: bool,
    bias: torch.dtype | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradients of x, of each view of the weight and of each of the bias in its dtype; empty if not needed."""
    d_x = _product(grad, as_multiplied(weight, grad.dtype, transposed=True)) if for_x else grad.new_empty(0)
    parts = _parts(bounds)
    d_weights = [F.linear(grad[rows].t(), x[rows].t()).to(weight.dtype) for rows in parts] if for_weights else []
    return d_x, d_weights, _sums_of_rows(grad, parts, bias) if bias else []


def _parts(bounds: Sequence[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(bounds)]


def _sums_of_rows(grad: Tensor, parts: Sequence[slice], dtype: torch.dtype) -> list[Tensor]:
    """Over each of the parts, [outputs]."""
    if not is_compiled("sums_of_rows", grad.device, grad.dtype):
        return [grad[rows].sum(0, dtype=dtype) for rows in parts]
    grad = grad.contiguous()
    sums = [torch.zeros(grad.shape[1]) for _ in parts]
    scratch = native_calls.row_scratch(max(rows.stop - rows.start for rows in parts), grad.shape[1])
    for rows, of_part in zip(parts, sums, strict=True):
        if rows.stop > rows.start:
            addresses = grad[rows].data_ptr(), of_part.data_ptr(), scratch.data_ptr()
            native_calls.run("sums_of_rows", grad.device, native_calls.activation(grad[rows]), *addresses)
    return [of_part.to(dtype) for of_part in sums]


@_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bounds: Sequence[int],
    for_x: bool,
    for_weights: bool,
    bias: torch.dtype | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    d_weights = [torch.empty_like(weight, memory_format=torch.contiguous_format) for _ in bounds[1:]]
    d_biases = [weight.new_empty(weight.shape[0], dtype=bias) for _ in bounds[1:]]
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if for_x else grad.new_empty(0)
    return d_x, d_weights if for_weights else [], d_biases if bias else []


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weights, biases, ctx.bounds = inputs
    ctx.save_for_backward(x, *weights, *biases)


def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    x, *params = ctx.saved_tensors
    views = len(ctx.bounds) - 1
    weights, biases = params[:views], params[views:]
    for_x, *for_params = ctx.needs_input_grad[:3]
    for_weights, for_biases = (any(wanted) for wanted in for_params)
    bias = biases[0].dtype if for_biases else None
    added = for_weights and is_added(*params)
    wanted = for_x, for_weights and not added, bias
    d_x, d_weights, d_biases = _linear_backward(grad, x, weights[0], ctx.bounds, *wanted)
    if added:
        for weight, rows in zip(weights, _parts(ctx.bounds), strict=True):
            add_weight_gradient(weight, grad[rows], x[rows])
        for of_task, sums in zip(biases, d_biases, strict=True):
            add_bias_gradient(of_task, sums)
        d_biases = []
    return d_x if for_x else None, d_weights or [None] * len(weights), d_biases or [None] * len(biases), None


_linear.register_autograd(_gradients, setup_context=_save)
first_order_only(_linear_backward, "linear")


def linear(
    x: Tensor,
    weight: task_views.Parameter | PackedWeight,
    bias: task_views.Parameter | None = None,
    *,
    bounds: Sequence[int] | None = None,
) -> Tensor:
    """x @ weight.T + bias, in x's precision.

    Args:
        x: [N, inputs], float32, bfloat16, float16 or float64.
        weight: [outputs, inputs], or T views of it, of x's dtype or float32; a float32 one is cast to x's. A
            `PackedWeight` of x's dtype where no gradient is needed.
        bias: [outputs], or T views of it, likewise.
        bounds: T + 1 numbers: view t gets the gradient of rows bounds[t] to bounds[t + 1].

    Returns:
        [N, outputs], of x's dtype.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "linear"
    if isinstance(weight, PackedWeight):
        return weight.linear(x, None if bias is None else task_views.first(bias))
    checks.tensor(op, "x", x, ["N", "inputs"], checks.FLOATS, contiguous=False)
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    (weights, *rest), bounds = task_views.views(op, x.shape[0], bounds, **given)
    biases: list[Tensor] = rest[0] if rest else []
    dtypes = dict.fromkeys((x.dtype, torch.float32))
    checks.tensor(op, "weight", weights[0], ["outputs", x.shape[1]], list(dtypes), like=x, contiguous=False)
    if biases:
        checks.tensor(op, "bias", biases[0], [weights[0].shape[0]], list(dtypes), like=x)
    if choice() == "auto":
        return _linear(x, weights, biases, bounds)

    def of_task(t: int, rows: slice) -> Tensor:
        return F.linear(x[rows], weights[t].to(x.dtype), biases[t].to(x.dtype) if biases else None)

    return task_views.by_segment(bounds, of_task)
