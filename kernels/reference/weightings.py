"""The weights of an update by the rules of the literature that read the Gram matrix of the task gradients.

Each rule is a function from a `Given` and its options to weights [T]. `given.gram` is G / trace(G), so that no number
under- or overflows; "relative" and "of the largest" below are in these units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from .loss_weightings import LOSS_RULES

Array = NDArray[np.float64]

LEAST_SUM = 1e-12  # relative: below it what cancels counts as 0
LEAST_NORM = 1e-4  # of CAGrad's smallest sum, where the largest gradient has a norm of at most 1
RIDGE = 1e-14  # on the diagonal of cosines, where Nash's and FairGrad's solutions would be infinite


class Given(NamedTuple):
    """What a rule reads, of one part of the model."""

    gram: Array  # [T, T] with a trace of 1
    trace: float  # of the Gram matrix as it came
    noise: Array  # [T]
    orders: NDArray[np.int64]  # [T T], row after row
    state: Array  # [S]; changed in place

    @property
    def mean(self) -> Array:
        """1 / T each."""
        return np.full(len(self.gram), 1 / len(self.gram))


def task_weights(
    gram: Tensor,
    rule: str,
    options: Sequence[float],
    losses: Tensor | None,
    noise: Tensor | None,
    orders: Tensor | None,
    state: Tensor | None,
) -> Tensor:
    """The weights [T] or [G, T], as `kernels.task_weights` describes them; `state` changes in place."""
    tasks = gram.shape[-1]
    grams = gram.detach().cpu().numpy().reshape(-1, tasks, tasks)
    traces = gram.reshape(-1, tasks, tasks).diagonal(dim1=1, dim2=2).sum(1).tolist()
    finite = (
        np.isfinite(grams).all() and np.isfinite(traces).all() and (losses is None or bool(losses.isfinite().all()))
    )
    if not finite:
        return torch.ones_like(gram[..., 0])
    of_parts = [_by_part(each, len(grams)) for each in (noise, orders, state)]
    weights = []
    for matrix, trace, own_noise, own_orders, own_state in zip(grams, traces, *of_parts, strict=True):
        if losses is not None:
            weights.append(LOSS_RULES[rule](matrix, losses.cpu().numpy(), own_state, *options))
        elif trace > 0:
            given = Given(matrix / trace, trace, own_noise, own_orders, own_state)
            weights.append(GRAM_RULES[rule](given, *options))
        else:
            weights.append(np.full(tasks, 1.0 if rule in ("nash-mtl", "config", "gradvac") else 1 / tasks))
    if state is not None:
        state.copy_(torch.from_numpy(of_parts[2]).reshape(state.shape))
    return torch.from_numpy(np.stack(weights)).reshape(gram.shape[:-1]).to(gram.device)


def _by_part(values: Tensor | None, parts: int) -> NDArray:
    """A copy of the values, flat for each part: [G, ...]."""
    return np.empty((parts, 0)) if values is None else values.detach().cpu().numpy().copy().reshape(parts, -1)


def _upgrad(given: Given, eps: float) -> Array:
    """Quinton and Rey 2024, section 3: the mean over i of gradient i's projection on the dual cone of all gradients."""
    return np.sum([_dual_projection(given, unit / len(unit), eps) for unit in np.eye(len(given.gram))], axis=0)


def _dualproj(given: Given, eps: float) -> Array:
    """Lopez-Paz and Ranzato 2017 (GEM), equation 11: the mean gradient's projection on the dual cone of all."""
    return _dual_projection(given, given.mean, eps)


def _dual_projection(given: Given, least: Array, eps: float) -> Array:
    """The v >= least with the least v' (G + eps I) v: with x = v - least, least squares with x >= 0.

    It gives which x are 0, and the others are solved for once more. (scipy's nnls errs for gradients of very different
    norms.)
    """
    regular = given.gram + eps * np.eye(len(least))
    root = np.linalg.cholesky(regular).T  # |root v|^2 is what is minimised
    lengths = np.linalg.norm(root, axis=0)
    squares = scipy.optimize.lsq_linear(root / lengths, -root @ least, (0, np.inf), method="bvls", tol=1e-15)
    free = squares.active_mask == 0
    v = least.copy()
    v[free] -= np.linalg.solve(regular[np.ix_(free, free)], (regular @ least)[free])
    return v


def _mgda(given: Given) -> Array:
    """Desideri 2012; Sener and Koltun 2018, equation 3: the point of least norm in the hull of the gradients."""
    return _nearest_to_0(_vectors(given.gram))


def _nearest_to_0(vectors: Array) -> Array:
    """The w >= 0 with sum 1 and the least |vectors w|, of columns `vectors`.

    With y = s w, |vectors y|^2 + (1 - sum y)^2 is least over s >= 0 at q / (1 + q), q = |vectors w|^2, which increases
    in q: least squares with y >= 0, and y scaled to a sum of 1.
    """
    rows = np.vstack([vectors, np.ones(vectors.shape[1])])
    solution = scipy.optimize.nnls(rows, np.append(np.zeros(len(vectors)), 1.0), maxiter=1000)[0]
    return solution / solution.sum()


def _vectors(gram: Array) -> Array:
    """T vectors in T dimensions, the columns, that have this Gram matrix."""
    values, vectors = np.linalg.eigh(gram)
    return np.sqrt(values.clip(min=0))[:, None] * vectors.T


def _cagrad(given: Given, c: float) -> Array:
    """Liu et al. 2021 (CAGrad), algorithm 1: the update in a ball around the mean that helps the worst task most.

    Its dual, min over the simplex of b' w + k |g_w| with b = G w0 and k = c |g_0|, has |g_w| = min over t > 0 of
    (|g_w|^2 / t + t) / 2, and for a given t, |g_w + (t / k) g_0| is to be least. |g_w| / t of that falls in t, and is 1
    at the solution. Where |g_w| is below 1e-4 all weights are 0.
    """
    vectors = _vectors(given.gram)
    middle = vectors @ given.mean
    radius = c * np.linalg.norm(middle)
    if radius == 0:
        return given.mean

    def inner(t: float) -> Array:
        return _nearest_to_0(vectors + (t / radius) * middle[:, None])

    def beyond(t: float) -> float:
        return float(np.linalg.norm(vectors @ inner(t)) / t) - 1

    if beyond(LEAST_NORM) < 0:
        return np.zeros_like(middle)
    # No gradient is longer than 1.
    norm = scipy.optimize.brentq(beyond, LEAST_NORM, 2.0, xtol=1e-300, rtol=1e-15, maxiter=5000)
    return given.mean + radius / norm * inner(norm)


def _imtl_g(given: Given) -> Array:
    """Liu et al. 2021 (IMTL), section 3.1: all gradients have the same projection on the update."""
    solution = _pseudo_inverse(given.gram) @ np.sqrt(np.diag(given.gram))
    if abs(solution.sum()) <= LEAST_SUM * abs(solution).sum():
        return given.mean
    return solution / solution.sum()


def _pseudo_inverse(gram: Array) -> Array:
    """The inverse on the eigenvectors whose eigenvalue is above rounding: the largest one's times T eps."""
    values, vectors = _eigenvalues(gram)
    return (vectors / values) @ vectors.T


def _eigenvalues(gram: Array) -> tuple[Array, Array]:
    """The eigenvalues above rounding in ascending order, and their eigenvectors as columns."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max() * len(gram) * np.finfo(np.float64).eps
    return values[kept], vectors[:, kept]


def _aligned_mtl(given: Given, mode: float) -> Array:
    """Senushkin et al. 2023, algorithm 1: gradients made orthogonal and equally long, nearest to what they were.

    Their common length is the root of an eigenvalue: the least, the (lower) median, or the mean of all.
    """
    values, vectors = _eigenvalues(given.gram)
    length = (values[0], values[(len(values) - 1) // 2], values.mean())[int(mode)]
    return np.sqrt(length) * (vectors / np.sqrt(values)) @ vectors.T @ given.mean


def _nash_mtl(given: Given, max_norm: float, every: float) -> Array:
    """Navon et al. 2022, algorithm 1: with G / |G| (Frobenius), G alpha = 1 / alpha; then scaled to at most `max_norm`.

    State: the calls so far, alpha before it is scaled [T].
    """
    calls, alpha = given.state[:1], given.state[1:]
    if calls[0] % every == 0:
        alpha[:] = _fair(given.gram / np.linalg.norm(given.gram), 1.0)
    calls += 1
    norm = np.sqrt((alpha @ given.gram @ alpha).clip(min=0)) * math.sqrt(given.trace)
    return alpha * (max_norm / norm) if norm > max_norm > 0 else alpha.copy()


def _fairgrad(given: Given, alpha: float) -> Array:
    """Ban and Ji 2024, equation 4: G w = w^(-1 / alpha), solved with the scaled G; 1 / T each for an alpha of 0."""
    return given.mean if alpha == 0 else _fair(given.gram, alpha) * given.trace ** (-alpha / (1 + alpha))


def _fair(gram: Array, alpha: float) -> Array:
    """The w > 0 with G w = w^(-1 / alpha); 0 for a gradient of 0.

    With cosines C and v_i = w_i |g_i| it is C v = b v^(-1 / alpha), b_i = |g_i|^(1 / alpha - 1): where the convex
    v' C v / 2 - sum of b times the integral of v^(-1 / alpha) is least. C has `RIDGE` added: v is finite for opposing
    gradients too.
    """
    norms = np.sqrt(np.diag(gram))
    some = norms > 0
    lengths = norms[some]
    cosines = gram[np.ix_(some, some)] / np.outer(lengths, lengths)
    np.fill_diagonal(cosines, 1 + RIDGE)
    power, gains = 1 / alpha, lengths ** (1 / alpha - 1)

    def slope(v: Array) -> Array:
        return cosines @ v - gains * v**-power

    v, sure_steps = gains ** (1 / (1 + power)), 0  # the solution for orthogonal gradients
    for _ in range(100):
        curvature = cosines + np.diag(power * gains * v ** (-power - 1))
        step = scipy.linalg.cho_solve(scipy.linalg.cho_factor(curvature), -slope(v))
        decrease, share = -slope(v) @ step, 1.0
        while (v + share * step <= 0).any() or slope(v + share * step) @ step > decrease / 2:
            share /= 2
        sure_steps += bool((abs(step) <= 1e-4 * v).all())
        v = v + share * step
        if sure_steps == 3:  # each squares the error
            break
    weights = np.zeros_like(norms)
    weights[some] = v / lengths
    return weights


def _config(given: Given) -> Array:
    """Liu et al. 2024 (ConFIG), equations 2 and 3: the direction that has the same angle with all gradients.

    The update is as long as the gradients' projections on that direction together. A gradient of 0 gets a weight of 0,
    and so do all where no direction is better than another: opposing gradients.
    """
    norms = np.sqrt(np.diag(given.gram))
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = given.gram * np.outer(inverse, inverse)
    solution = _pseudo_inverse(cosines) @ np.where(norms > 0, 1.0, 0.0)
    projections = cosines @ solution
    square = solution @ projections
    return (norms @ projections) * solution * inverse / square if square > LEAST_SUM else np.zeros_like(norms)


def _gradvac(given: Given, beta: float) -> Array:
    """Wang et al. 2021 (Gradient Vaccine), algorithm 1: PCGrad's walk, towards a moving average of the cosines.

    Gradient i meets the others in its order; where their cosine is below its average phi_ij, a multiple of gradient j
    is added that makes it phi_ij. Neither happens where one of the two is 0, nor a change where phi_ij is 1.
    State: phi [T, T].
    """
    gram, tasks = given.gram, len(given.gram)
    average = given.state.reshape(tasks, tasks)
    total = np.zeros(tasks)
    for i, order in enumerate(given.orders.reshape(tasks, tasks)):
        coefficients = np.eye(tasks)[i]
        for j in order:
            own = math.sqrt(max(coefficients @ gram @ coefficients, 0.0))
            other = math.sqrt(gram[j, j])
            if i == j or own * other == 0:
                continue
            cosine = min(max(coefficients @ gram[j] / (own * other), -1.0), 1.0)
            target = average[i, j]
            sine, target_sine = math.sqrt(1 - cosine**2), math.sqrt(max(1 - target**2, 0.0))
            if cosine < target and target_sine > 0:
                coefficients[j] += own * (target * sine - cosine * target_sine) / (other * target_sine)
            average[i, j] = (1 - beta) * target + beta * cosine
        total += coefficients
    return total


def _random(given: Given) -> Array:
    """Lin et al. 2022 (RLW): the softmax of standard normal numbers."""
    return scipy.special.softmax(given.noise)


GRAM_RULES: dict[str, Callable[..., Array]] = {
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "mgda": _mgda,
    "cagrad": _cagrad,
    "imtl-g": _imtl_g,
    "aligned-mtl": _aligned_mtl,
    "nash-mtl": _nash_mtl,
    "config": _config,
    "gradvac": _gradvac,
    "fairgrad": _fairgrad,
    "random": _random,
}
