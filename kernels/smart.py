"""SMART's perturbations: the normal start, and one projected step of gradient ascent."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import compiled
from .native import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}  # csrc/kernels.h's DType


def _takes(op: str, x: Tensor) -> bool:
    """Whether native code runs an op for x."""
    takes = x.dtype in _DTYPES and (x.dtype != torch.float16 or x.device.type == "cuda")
    return takes and compiled(op, x.device) is not None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _start(x: Tensor, sigma: float, seed: Tensor, stream_id: int, scale: Tensor | None) -> tuple[Tensor, tuple]:
    """Memory for the result, and csrc/kernels.h's NormalStart."""
    out = torch.empty_like(x)
    rows, columns = x.shape
    addresses = x.data_ptr(), out.data_ptr()
    return out, (*addresses, _DTYPES[x.dtype], rows, columns, sigma, _address(scale), seed.data_ptr(), stream_id)


@torch.library.custom_op("minbert::smart_init", mutates_args=(), device_types="cpu")
def _smart_init(x: Tensor, sigma: float, seed: Tensor, stream_id: int, scale: Tensor | None = None) -> Tensor:
    out, start = _start(x, sigma, seed, stream_id, scale)
    library().smart_init(start, torch.get_num_threads())
    return out


@_smart_init.register_kernel("cuda")
def _(x: Tensor, sigma: float, seed: Tensor, stream_id: int, scale: Tensor | None = None) -> Tensor:
    with torch.cuda.device(x.device):
        out, start = _start(x, sigma, seed, stream_id, scale)
        library().cuda_smart_init(start, torch.cuda.current_stream().cuda_stream)
    return out


@_smart_init.register_fake
def _(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x)


def _ascent(
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
) -> tuple[Tensor, tuple]:
    """Memory for the result, and csrc/kernels.h's Ascent."""
    out = torch.empty_like(perturbed)
    tokens, columns = perturbed.shape
    groups = cu_seqlens.shape[0] - 1 if per_sequence else tokens
    addresses = perturbed.data_ptr(), x.data_ptr(), grad.data_ptr(), out.data_ptr()
    sizes = cu_seqlens.data_ptr() if per_sequence else 0, groups, tokens, columns
    lengths = eta, epsilon, _address(scale)
    return out, (*addresses, _DTYPES[perturbed.dtype], *sizes, *lengths, infinity_norm, onto_ball)


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
    scale: Tensor | None = None,
) -> Tensor:
    out, ascent = _ascent(perturbed, x, grad, cu_seqlens, eta, epsilon, infinity_norm, per_sequence, onto_ball, scale)
    library().smart_ascend(ascent, torch.get_num_threads())
    return out


@_smart_ascend.register_kernel("cuda")
def _(perturbed: Tensor, *others) -> Tensor:
    with torch.cuda.device(perturbed.device):
        out, ascent = _ascent(perturbed, *others)
        library().cuda_smart_ascend(ascent, torch.cuda.current_stream().cuda_stream)
    return out


@_smart_ascend.register_fake
def _(perturbed: Tensor, *_) -> Tensor:
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
    if _takes("smart_init", x):
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
        per: "token" or "sequence": whose elements a norm is taken over.
        projection: "ball" moves what left the ball back to its nearest point, and leaves the rest untouched to the bit;
            "unit" rescales every offset to the norm epsilon, as the released implementations do (an offset of 0 stays).
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
    checks.cu_seqlens(op, cu_seqlens, tokens=perturbed.shape[0])
    if cu_seqlens.device != perturbed.device:
        raise ValueError(f"{op}: cu_seqlens must be on {perturbed.device}, got {cu_seqlens.device}")
    checks.number(op, "eta", eta)
    checks.number(op, "epsilon", epsilon)
    checks.choice(op, "norm", norm, ("inf", "2"))
    checks.choice(op, "per", per, ("token", "sequence"))
    checks.choice(op, "projection", projection, ("ball", "unit"))
    _check_scale(op, scale, perturbed)
    if _takes(op, perturbed):
        choices = norm == "inf", per == "sequence", projection == "ball"
        return _smart_ascend(perturbed, x, grad, cu_seqlens, eta, epsilon, *choices, scale)
    return reference.smart_ascend(perturbed, x, grad, cu_seqlens, eta, epsilon, norm, per, projection, scale)
