"""SMART's perturbation."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import widened
from .random_numbers import normal


def _in_units(length: float, scale: Tensor | None, like: Tensor) -> Tensor:
    """A length in units of `scale`, or of 1, as a scalar."""
    return length * (like.new_ones(()) if scale is None else scale.to(like.dtype))


def smart_init(x: Tensor, sigma: float, seed: Tensor, stream_id: int, scale: Tensor | None = None) -> Tensor:
    """x + sigma `normal`, the start of SMART's ascent; x [N, D] (Jiang et al. 2019, algorithm 1).

    sigma is in units of `scale`, a scalar tensor, where there is one.
    """
    if sigma == 0:
        return x.clone()
    wide = widened(x)
    noise = normal(x.shape[0], x.shape[1], seed, stream_id, wide.dtype)
    return (wide + _in_units(sigma, scale, wide) * noise).to(x.dtype)


def smart_ascend(
    perturbed: Tensor,
    x: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    eta: float,
    epsilon: float,
    norm: str,
    per: str,
    projection: str,
    scale: Tensor | None = None,
) -> Tensor:
    """One projected step of SMART's gradient ascent (Jiang et al. 2019, algorithm 1); [N, D] all.

    eta and epsilon are in units of `scale`, a scalar tensor, where there is one. A group is a token or a sequence.
    Within each group:

    1. point = perturbed + eta grad / |grad|, or perturbed where eta is 0 or |grad| is 0 or not finite.
    2. "ball": the nearest result to `point` with |result - x| <= epsilon. In the infinity norm every element is clamped
       to [x - epsilon, x + epsilon]; in the L2 norm the offset from x is rescaled if it is longer than epsilon. What
       lies in the ball stays as it is, to the bit.
       "unit": the offset of `point` from x is rescaled to the norm epsilon; it stays where its norm is 0 or not finite.

    L2 norms are summed in float64, so that no square overflows or vanishes.
    """
    start, centre, gradient = widened(perturbed), widened(x), widened(grad)
    step, radius = _in_units(eta, scale, start), _in_units(epsilon, scale, start)
    gradient_norm = _group_norms(gradient, cu_seqlens, norm, per)
    moves = (gradient_norm > 0) & gradient_norm.isfinite() & (step != 0)
    point = torch.where(moves, start + gradient / gradient_norm * step, start)
    if projection == "ball" and norm == "inf":
        low, high = centre - radius, centre + radius
        result = torch.where(point < low, low, point)
        result = torch.where(result > high, high, result)
    else:
        distance = _group_norms(point - centre, cu_seqlens, norm, per)
        rescales = distance > radius if projection == "ball" else (distance > 0) & distance.isfinite()
        result = torch.where(rescales, centre + (point - centre) / distance * radius, point)
    return result.to(perturbed.dtype)


def _group_norms(x: Tensor, cu_seqlens: Tensor, norm: str, per: str) -> Tensor:
    """For every token [N, 1] the norm of its group's elements."""
    totals = x.abs().amax(1) if norm == "inf" else x.double().square().sum(1)
    if per == "sequence":
        lengths = cu_seqlens.diff().long()
        groups = totals.split(lengths.tolist())
        totals = torch.stack([group.amax() if norm == "inf" else group.sum() for group in groups])
        totals = totals.repeat_interleave(lengths)
    return (totals if norm == "inf" else totals.sqrt().to(x.dtype))[:, None]
