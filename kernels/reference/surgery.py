"""Gradient surgery: Gram matrix, weights and weighted sum of task gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import widened


def gram(grads: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Gram matrix of the task gradients, float64 [T, T]: entry (i, j) is the sum over all elements of g_i g_j.

    A missing tensor (None) counts as zeros. Sparse gradients are what they are as dense ones.
    """
    tasks = len(grads)
    total = torch.zeros(tasks, tasks, dtype=torch.float64)
    for row in zip(*grads, strict=True):
        present = [t for t in range(tasks) if row[t] is not None]
        if present:
            flat = torch.stack([row[t].to_dense().reshape(-1).double() for t in present])  # type: ignore[union-attr]
            total = total.to(flat.device)
            total[torch.tensor(present)[:, None], torch.tensor(present)] += flat @ flat.T
    return total


def combine(grads: Sequence[Sequence[Tensor | None]], weights: Tensor) -> list[Tensor | None]:
    """The weighted sum of the task gradients, tensor by tensor; None where no task has the tensor."""
    combined: list[Tensor | None] = []
    for row in zip(*grads, strict=True):
        terms = [w.to(widened(g).dtype) * widened(g) for w, g in zip(weights, row, strict=True) if g is not None]
        first = next((g for g in row if g is not None), None)
        combined.append(sum(terms[1:], terms[0]).to(first.dtype) if first is not None else None)
    return combined


def clip_weights(gram: Tensor, weights: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Weights whose sum of gradients has an L2 norm of at most `max_norm`, and the norm before: |sum w g|^2 = w' G w.

    Rounding may leave the square of a sum that cancels a little below 0: it counts as 0. Where the norm is NaN or Inf,
    it is returned and the weights stay as they are.
    """
    norm = (weights @ gram @ weights).clamp(min=0).sqrt()
    clips = (norm > max_norm) & norm.isfinite()
    return torch.where(clips, weights * (max_norm / norm), weights), norm


def surgery_weights(
    gram: Tensor, orders: Tensor | None, weights: Tensor | None, own_square: Tensor | None, max_norm: float, mean: bool
) -> tuple[Tensor, Tensor]:
    """The weights of the task gradients, and [norm, clip scale, whether the norm is finite, projected share].

    PCGrad's where orders [T, T] are given (Yu et al. 2020, algorithm 1), projecting coefficients of gradients instead
    of gradients; else `weights`, else 1 each, or 1 / T for the mean. Every operation is on two float64 numbers, in the
    order written here: other implementations give the same bits.
    """
    products, tasks = gram.tolist(), len(gram)
    plain = [1 / tasks if mean else 1.0] * tasks
    if orders is not None:
        total = [0.0] * tasks
        finite = bool(gram.isfinite().all())
        for i, order in enumerate(orders.tolist()):
            coefficients = [float(j == i) for j in range(tasks)]  # of task i's gradient, in terms of the original ones
            for j in order if finite else ():
                product = _dot(coefficients, products[j])
                if j != i and product < 0 < products[j][j]:
                    coefficients[j] -= product / products[j][j]
            total = [a + b for a, b in zip(total, coefficients, strict=True)]
        result = [weight / tasks for weight in total] if mean else total
    else:
        result = plain if weights is None else weights.tolist()

    def square(v: list[float]) -> float:  # v' G v
        return _dot([1.0] * tasks, [a * _dot(row, v) for a, row in zip(v, products, strict=True)])

    def at_least_0(x: float) -> float:  # what cancels counts as 0; -Inf stays: its root is NaN
        return 0.0 if -math.inf < x < 0 else x

    def root(x: float) -> float:
        return math.nan if x == -math.inf else math.sqrt(at_least_0(x))

    own = 0.0 if own_square is None else own_square.item()
    norm = root(at_least_0(square(result)) + own)
    scale = max_norm / norm if 0 < max_norm < norm < math.inf else 1.0
    whole, changed = square(plain), square([a - b for a, b in zip(result, plain, strict=True)])
    share = root(changed / whole) if whole > 0 else math.nan
    stats = gram.new_tensor([norm, scale, float(math.isfinite(norm)), share])
    return gram.new_tensor([weight * scale for weight in result]), stats


def _dot(a: list[float], b: list[float]) -> float:
    total = 0.0  # not sum(), which compensates from Python 3.12 on
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total
