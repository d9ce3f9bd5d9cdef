"""The weights of an update by the rules of the literature that read the task losses.

Each rule is a function from the Gram matrix [T, T] as it came, losses [T], a state [S] and its options to weights [T].
A state starts as zeros and changes in place. Adam is torch.optim.Adam with betas 0.9 and 0.999 and an eps of 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST_LOSS = 1e-8
LEAST_WEIGHT = 1e-3  # of GradNorm


def _adam(
    values: Array, gradient: Array, first: Array, second: Array, step: float, lr: float, decay: float = 0
) -> None:
    """A step of torch.optim.Adam with L2 regularisation, in place; `step` counts from 1."""
    gradient = gradient + decay * values
    first[:] = 0.9 * first + 0.1 * gradient
    second[:] = 0.999 * second + 0.001 * gradient**2
    values -= lr / (1 - 0.9**step) * first / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)


def _parts(state: Array, tasks: int) -> list[Array]:
    """The number of calls so far [1], and what follows it, [T] each."""
    return [state[:1], *state[1:].reshape(-1, tasks)]


def _famo(gram: Array, losses: Array, state: Array, lr: float, weight_decay: float) -> Array:
    """Liu et al. 2023 (FAMO), algorithm 1; each loss counts as max(loss, 0) + 1e-8.

    The logits learn from how the last update changed the log losses. Here those after it are of the next step's
    examples: the paper evaluates the same examples twice.
    State: the calls so far, logits, Adam's first and second moments, last losses.
    """
    calls, logits, first, second, last = _parts(state, len(losses))
    losses = losses.clip(min=0) + LEAST_LOSS
    if calls[0] > 0:
        change = np.log(last) - np.log(losses)
        shares = scipy.special.softmax(logits)
        gradient = shares * (change - shares @ change)  # the derivative of softmax(logits)' change
        _adam(logits, gradient, first, second, calls[0], lr, weight_decay)
    calls += 1
    last[:] = losses
    shares = scipy.special.softmax(logits) / losses
    return shares / shares.sum()


def _uncertainty(gram: Array, losses: Array, state: Array, lr: float) -> Array:
    """Kendall et al. 2018, with s_i = log sigma_i^2: the sum of exp(-s_i) l_i / 2 + s_i / 2, of which s follows Adam.

    State: the calls so far, s, Adam's first and second moments.
    """
    calls, s, first, second = _parts(state, len(losses))
    weights = np.exp(-s) / 2
    calls += 1
    _adam(s, 0.5 - weights * losses, first, second, calls[0], lr)
    return weights


def _dwa(gram: Array, losses: Array, state: Array, temperature: float, every: float) -> Array:
    """Liu et al. 2019 (dynamic weight average), equation 7, of windows of `every` calls instead of epochs.

    A ratio of two windows' losses that is not finite counts as 1.
    State: the calls so far, the sum of losses in this window, their means in the last window and in the one before. A
    window ends within its last call.
    """
    calls, total, newer, older = _parts(state, len(losses))
    with np.errstate(all="ignore"):
        ratio = newer / older
    rates = np.where(np.isfinite(ratio), ratio, 1.0) / temperature
    weights = len(losses) * scipy.special.softmax(rates) if calls[0] >= 2 * every else np.ones_like(losses)
    total += losses
    calls += 1
    if calls[0] % every == 0:
        older[:], newer[:], total[:] = newer, total / every, 0
    return weights


def _gradnorm(gram: Array, losses: Array, state: Array, alpha: float, lr: float) -> Array:
    """Chen et al. 2018 (GradNorm), algorithm 1, with the norms of whole gradients; the weights before their step.

    Each norm aims at the mean of all times r_i^alpha, r_i = (l_i / first l_i) / mean of these ratios. A ratio below 0
    counts as 0, one that is not finite as 1; with a mean of 0 all r are 1. After Adam's step the weights are raised to
    at least 1e-3, then scaled to a sum of T.
    State: the calls so far, weights, first losses, Adam's first and second moments.
    """
    calls, weights, initial, first, second = _parts(state, len(losses))
    if calls[0] == 0:
        weights[:], initial[:] = 1, losses
    before = weights.copy()
    with np.errstate(all="ignore"):
        ratio = losses / initial
    ratio = np.where(np.isfinite(ratio), ratio, 1.0).clip(min=0)
    ratio = ratio / ratio.mean() if ratio.mean() > 0 else np.ones_like(ratio)
    norms = np.sqrt(np.diag(gram))
    aim = (weights * norms).mean() * ratio**alpha
    calls += 1
    _adam(weights, np.sign(weights * norms - aim) * norms, first, second, calls[0], lr)
    weights[:] = weights.clip(min=LEAST_WEIGHT)
    weights *= len(weights) / weights.sum()
    return before


def _geometric_mean(gram: Array, losses: Array, state: Array) -> Array:
    """Chennupati et al. 2019 (MultiNet++): the derivatives of the geometric mean of the losses, each at least 1e-8."""
    losses = losses.clip(min=LEAST_LOSS)
    return np.exp(np.log(losses).mean()) / (len(losses) * losses)


LOSS_RULES: dict[str, Callable[..., Array]] = {
    "famo": _famo,
    "uncertainty": _uncertainty,
    "dwa": _dwa,
    "gradnorm": _gradnorm,
    "geometric-mean": _geometric_mean,
}
