"""SMART's perturbations: the normal start, and one projected step of gradient ascent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls, reference
from .dispatch import is_compiled
from .flight_recorder import recorded


@torch.library.custom_op("minbert::smart_init", mutates_args=(), device_types=("cpu", "cuda"))
@recorded("smart_init")
def _smart_init(x: Tensor, sigma: float, seed: Tensor, stream_id: int, scale: Tensor | None = None) -> Tensor:
    out = torch.empty_like(x)
    rows, columns, dtype = native_calls.activation(x)
    addresses, stream = (x.data_ptr(), out.data_ptr()), (seed.data_ptr(), stream_id)
    # csrc/kernels.h's NormalStart
    start = (*addresses, dtype, rows, columns, sigma, native_calls.address(scale), *stream)
    native_calls.run("smart_init", x.device, start)
    return out


@_smart_init.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("minbert::smart_ascend", mutates_args=(), device_types=("cpu", "cuda"))
@recorded("smart_ascend")
def _smart_ascend(
    perturbed: Tensor,
    x: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    eta: float,
    epsilon: float,
    infinity_norm: bool,
    per_sequence: bool,
    onto_ball: bool,
    scale: Tensor | None = None,
) -> Tensor:
    tokens, columns, dtype = native_calls.activation(perturbed)
    if cu_seqlens.device.type == "cpu":
        checks.cu_seqlens_values("smart_ascend", cu_seqlens, tokens)
    out = torch.empty_like(perturbed)
    groups = (cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1) if per_sequence else (0, tokens)
    addresses = (tensor.data_ptr() for tensor in (perturbed, x, grad, out))
    lengths = eta, epsilon, native_calls.address(scale)
    # csrc/kernels.h's Ascent
    ascent = (*addresses, dtype, *groups, tokens, columns, *lengths, infinity_norm, onto_ball)
    native_calls.run("smart_ascend", perturbed.device, ascent)
    return out


@_smart_ascend.register_fake
def _(perturbed: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(perturbed)


def _check_scale(op: str, scale: Tensor | None, like: Tensor) -> None:
    if scale is not None:
        checks.tensor(op, "scale", scale, [], [torch.float32], like=like)


@torch.no_grad()
def smart_init(x: Tensor, *, sigma: float, seed: Tensor, stream_id: int, scale: Tensor | None = None) -> Tensor:
    """x + N(0, sigma^2), the start of SMART's ascent (Jiang et al. 2019, algorithm 1). Not differentiable.

    Args:
        x: float [N, D]. Native code takes float32 and bfloat16, on GPUs float16 too; other dtypes run the reference.
        sigma: the noise's standard deviation; 0 gives a copy of x.
        seed, stream_id: as for `dropout_mask`. The numbers are none of those that dropout reads there.
        scale: float32 scalar tensor, finite and not negative: sigma is in units of it. It is read where the op runs,
            so no host waits for it. None: 1.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("smart_init", "x", x, ["N", "D"], checks.FLOATS)
    checks.number("smart_init", "sigma", sigma)
    seed = checks.stream("smart_init", seed, stream_id, x.device)
    _check_scale("smart_init", scale, x)
    if sigma == 0:
        return x.clone()
    if is_compiled("smart_init", x.device, x.dtype):
        return _smart_init(x, sigma, seed, stream_id, scale)
    return reference.smart_init(x, sigma, seed, stream_id, scale)


@torch.no_grad()
def smart_ascend(
    perturbed: Tensor,
    x: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    *,
    eta: float,
    epsilon: float,
    norm: str = "inf",
    per: str = "token",
    projection: str = "ball",
    scale: Tensor | None = None,
) -> Tensor:
    """One projected step of SMART's gradient ascent (Jiang et al. 2019, algorithm 1). Not differentiable.

    Args:
        perturbed, x, grad: float [N, D], of one dtype: the perturbed embeddings, the clean ones, and the gradient of
            the divergence with respect to `perturbed`. Native code takes float32 and bfloat16, on GPUs float16 too;
            other dtypes run the reference.
        cu_seqlens: int32 [S + 1], cumulative sequence lengths from 0 to N.
        eta: the step's length: the gradient is scaled to norm 1. A gradient that is 0 or not finite takes no step.
        epsilon: the radius of the ball around x.
        norm: "inf" or "2", of the gradient and of the offset from x alike.
        per: "token" or "sequence": the elements over which each norm is computed.
        projection: "ball" maps points outside the ball to the nearest point of it, and leaves the rest as they are, to
            the bit; "unit" rescales every offset to the norm epsilon (smart-pytorch: to 1, whatever its epsilon; an
            offset of 0 stays).
        scale: as for `smart_init`: eta and epsilon are in units of it.

    Returns:
        the new perturbed embeddings [N, D].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "smart_ascend"
    checks.tensor(op, "perturbed", perturbed, ["N", "D"], checks.FLOATS)
    for name, tensor in (("x", x), ("grad", grad)):
        checks.tensor(op, name, tensor, perturbed.shape, [perturbed.dtype], like=perturbed)
    checks.cu_seqlens_shape(op, cu_seqlens)
    if cu_seqlens.device != perturbed.device:
        raise ValueError(f"{op}: cu_seqlens must be on {perturbed.device}, got {cu_seqlens.device}")
    checks.number(op, "eta", eta)
    checks.number(op, "epsilon", epsilon)
    checks.choice(op, "norm", norm, ("inf", "2"))
    checks.choice(op, "per", per, ("token", "sequence"))
    checks.choice(op, "projection", projection, ("ball", "unit"))
    _check_scale(op, scale, perturbed)
    if is_compiled(op, perturbed.device, perturbed.dtype):
        choices = norm == "inf", per == "sequence", projection == "ball"
        return _smart_ascend(perturbed, x, grad, cu_seqlens, eta, epsilon, *choices, scale)
    checks.cu_seqlens(op, cu_seqlens, perturbed.shape[0])
    return reference.smart_ascend(perturbed, x, grad, cu_seqlens, eta, epsilon, norm, per, projection, scale)
