"""SMART's perturbations: the normal start, and one projected step of gradient ascent."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import compiled
from .native import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/launch.h's DType, what the native code takes


@torch.library.custom_op("minbert::smart_init", mutates_args=(), device_types="cpu")
def _smart_init(x: Tensor, sigma: float, seed: Tensor, site: int) -> Tensor:
    out = torch.empty_like(x)
    rows, columns = x.shape
    threads = torch.get_num_threads()
    library().smart_init(
        x.data_ptr(), out.data_ptr(), _DTYPES[x.dtype], rows, columns, sigma, seed.item(), site, threads
    )
    return out


@_smart_init.register_fake
def _(x: Tensor, sigma: float, seed: Tensor, site: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("minbert::smart_ascend", mutates_args=(), device_types="cpu")
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
) -> Tensor:
    out = torch.empty_like(perturbed)
    tokens, columns = perturbed.shape
    library().smart_ascend(
        perturbed.data_ptr(),
        x.data_ptr(),
        grad.data_ptr(),
        out.data_ptr(),
        _DTYPES[perturbed.dtype],
        cu_seqlens.data_ptr() if per_sequence else 0,
        cu_seqlens.shape[0] - 1 if per_sequence else tokens,
        tokens,
        columns,
        eta,
        epsilon,
        infinity_norm,
        onto_ball,
        torch.get_num_threads(),
    )
    return out


@_smart_ascend.register_fake
def _(
    perturbed: Tensor,
    x: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    eta: float,
    epsilon: float,
    infinity_norm: bool,
    per_sequence: bool,
    onto_ball: bool,
) -> Tensor:
    return torch.empty_like(perturbed)


@torch.no_grad()
def smart_init(x: Tensor, *, sigma: float, seed: Tensor, site: int) -> Tensor:
    """x + N(0, sigma^2), the start of SMART's ascent (Jiang et al. 2019, algorithm 1). Not differentiable.

    Args:
        x: float [N, D]. Native code takes float32 and bfloat16; other dtypes run the reference.
        sigma: the noise's standard deviation; 0 gives a copy of x.
        seed, site: as for `dropout_mask`. The numbers are none of those that dropout reads there.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("smart_init", "x", x, ["N", "D"], checks.FLOATS)
    checks.number("smart_init", "sigma", sigma)
    checks.stream("smart_init", seed, site, x.device)
    if sigma == 0:
        return x.clone()
    if x.dtype in _DTYPES and compiled("smart_init", x.device):
        return _smart_init(x, sigma, seed, site)
    return reference.smart_init(x, sigma, seed, site)


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
) -> Tensor:
    """One projected step of SMART's gradient ascent (Jiang et al. 2019, algorithm 1). Not differentiable.

    Args:
        perturbed, x, grad: float [N, D], of one dtype: the perturbed embeddings, the clean ones, and the gradient of
            the divergence with respect to `perturbed`. Native code takes float32 and bfloat16; other dtypes run the
            reference.
        cu_seqlens: int32 [S + 1], cumulative sequence lengths from 0 to N.
        eta: the step's length: the gradient is scaled to norm 1. A gradient that is 0 or not finite takes no step.
        epsilon: the radius of the ball around x.
        norm: "inf" or "2", of the gradient and of the offset from x alike.
        per: "token" or "sequence": whose elements a norm is taken over.
        projection: "ball" moves what left the ball back to its nearest point, and leaves the rest untouched to the bit;
            "unit" rescales every offset to the norm epsilon, as the released implementations do (an offset of 0 stays).

    Returns:
        the new perturbed embeddings [N, D].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "smart_ascend"
    checks.tensor(op, "perturbed", perturbed, ["N", "D"], checks.FLOATS)
    for name, tensor in (("x", x), ("grad", grad)):
        checks.tensor(op, name, tensor, perturbed.shape, [perturbed.dtype], like=perturbed)
    checks.cu_seqlens(op, cu_seqlens, tokens=perturbed.shape[0])
    if cu_seqlens.device != perturbed.device:
        raise ValueError(f"{op}: cu_seqlens must be on {perturbed.device}, got {cu_seqlens.device}")
    checks.number(op, "eta", eta)
    checks.number(op, "epsilon", epsilon)
    checks.choice(op, "norm", norm, ("inf", "2"))
    checks.choice(op, "per", per, ("token", "sequence"))
    checks.choice(op, "projection", projection, ("ball", "unit"))
    if perturbed.dtype in _DTYPES and compiled(op, perturbed.device):
        return _smart_ascend(
            perturbed, x, grad, cu_seqlens, eta, epsilon, norm == "inf", per == "sequence", projection == "ball"
        )
    return reference.smart_ascend(perturbed, x, grad, cu_seqlens, eta, epsilon, norm, per, projection)
