"""Gradient surgery: Gram matrix, weights and weighted sum of task gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import widened


def gram(grads: Sequence[Sequence[Tensor | None]], parts: Sequence[int] | None = None, part_count: int = 1) -> Tensor:
    """Gram matrix of the task gradients, float64 [T, T]: entry (i, j) is the sum over all elements of g_i g_j.

    A missing tensor (None) counts as zeros. Sparse gradients are what they are as dense ones. With `parts`, the number
    of each position's part of the model, the result is [G, T, T]: a matrix of each part's tensors.
    """
    tasks = len(grads)
    total = torch.zeros(part_count, tasks, tasks, dtype=torch.float64)
    for k, row in enumerate(zip(*grads, strict=True)):
        present = [t for t in range(tasks) if row[t] is not None]
        if present:
            flat = torch.stack([row[t].to_dense().reshape(-1).double() for t in present])  # type: ignore[union-attr]
            total = total.to(flat.device)
            own = total[0 if parts is None else parts[k]]
            own[torch.tensor(present)[:, None], torch.tensor(present)] += flat @ flat.T
    return total[0] if parts is None else total


def combine(
    grads: Sequence[Sequence[Tensor | None]], weights: Tensor, parts: Sequence[int] | None = None
) -> list[Tensor | None]:
    """The weighted sum of the task gradients, tensor by tensor; None where no task has the tensor.

    With `parts`, the number of each position's part of the model, the weights are [G, T].
    """
    combined: list[Tensor | None] = []
    for k, row in enumerate(zip(*grads, strict=True)):
        own = weights if parts is None else weights[parts[k]]
        terms = [w.to(widened(g).dtype) * widened(g) for w, g in zip(own, row, strict=True) if g is not None]
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
    of gradients; else `weights`, else 1 each, or 1 / T for the mean. With matrices, orders and weights of G parts, each
    part has its own, and the statistics are those of all parts. Every operation is on two float64 numbers, in the order
    written here: other implementations give the same bits.
    """
    tasks = gram.shape[-1]
    matrices = gram.reshape(-1, tasks, tasks)
    plain, own = [1 / tasks if mean else 1.0] * tasks, 0.0 if own_square is None else own_square.item()
    results, squares = [], [0.0, 0.0, 0.0]  # of the sums of gradients with the weights, of the change, of the plain sum
    for part, matrix in enumerate(matrices):
        if orders is not None:
            result = _pcgrad(matrix, orders.reshape(-1, tasks, tasks)[part], mean)
        else:
            result = plain if weights is None else weights.reshape(-1, tasks)[part].tolist()
        results.append(result)
        change = [a - b for a, b in zip(result, plain, strict=True)]
        for form, v in enumerate((result, change, plain)):
            squares[form] += _at_least_0(_square(matrix.tolist(), v))
    norm = _root(squares[0] + own)
    scale = max_norm / norm if 0 < max_norm < norm < math.inf else 1.0
    share = _root(squares[1] / squares[2]) if squares[2] > 0 else math.nan
    stats = gram.new_tensor([norm, scale, float(math.isfinite(norm)), share])
    return gram.new_tensor([[w * scale for w in result] for result in results]).reshape(gram.shape[:-1]), stats


def _pcgrad(gram: Tensor, orders: Tensor, mean: bool) -> list[float]:
    products, tasks = gram.tolist(), len(gram)
    total, finite = [0.0] * tasks, bool(gram.isfinite().all())
    for i, order in enumerate(orders.tolist()):
        coefficients = [float(j == i) for j in range(tasks)]  # of task i's gradient, in terms of the original ones
        for j in order if finite else ():
            product = _dot(coefficients, products[j])
            if j != i and product < 0 < products[j][j]:
                coefficients[j] -= product / products[j][j]
        total = [a + b for a, b in zip(total, coefficients, strict=True)]
    return [weight / tasks for weight in total] if mean else total


def _square(products: list[list[float]], v: list[float]) -> float:
    """v' G v."""
    return _dot([1.0] * len(v), [a * _dot(row, v) for a, row in zip(v, products, strict=True)])


def _at_least_0(x: float) -> float:
    """What cancels counts as 0; -Inf stays: its root is NaN."""
    return 0.0 if -math.inf < x < 0 else x


def _root(x: float) -> float:
    return math.nan if x == -math.inf else math.sqrt(_at_least_0(x))


def _dot(a: list[float], b: list[float]) -> float:
    total = 0.0  # not sum(), which compensates from Python 3.12 on
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total
