"""Gradients for the tests of rules that weight tasks, and what the tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from minbert import kernels
from minbert.methods.weightings import WEIGHTINGS

GRAM_RULES = [name for name, rule in kernels.WEIGHTING_RULES.items() if "losses" not in rule.needs]
LOSS_RULES = [name for name, rule in kernels.WEIGHTING_RULES.items() if "losses" in rule.needs]
# those whose weights are a function of the Gram matrix alone
FUNCTIONS_OF_GRAM = [name for name in GRAM_RULES if name not in ("random", "gradvac")]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(rows: Tensor) -> Tensor:
    gram = rows @ rows.T
    return (gram + gram.T) / 2


def weights_of(rule: str, gram: Tensor, *, seed: int = 0, **given: Any) -> Tensor:
    """The weights by a rule's default options, or those of `given`, in which `losses` and `state` may be too.

    Random numbers are of `seed`, losses ones, and a state is new, where they are not given.
    """
    losses, state = given.pop("losses", torch.ones(gram.shape[-1], dtype=torch.float64)), given.pop("state", None)
    weighting = WEIGHTINGS[rule](**given)
    if state is None:
        state = weighting.state(gram.shape[-1], None if gram.dim() == 2 else len(gram))
    return weighting.weights(gram, losses, state, torch.Generator().manual_seed(seed))


def conflicting(tasks: int, size: int, seed: int = 0) -> Tensor:
    """Random gradients [T, size], most of which conflict with others."""
    rows = randn(tasks, size, seed=seed)
    return rows - 0.9 * rows.mean(0)


def independent(tasks: int, seed: int = 0) -> Tensor:
    """Conflicting gradients [T, T + 3] of different norms, far from dependent."""
    return conflicting(tasks, tasks + 3, seed) * torch.linspace(0.5, 2, tasks, dtype=torch.float64)[:, None]


@st.composite
def any_gradients(draw: st.DrawFn, most_tasks: int = 16) -> Tensor:
    """Gradients [T, size] of all kinds: dependent, parallel, opposing, zero, and of very different norms."""
    tasks, size = draw(st.integers(1, most_tasks)), draw(st.integers(1, 20))
    rows = conflicting(tasks, size, draw(st.integers(0, 2**31)))
    for i in range(tasks):
        kind = draw(st.sampled_from(["as it is"] * 6 + ["zero", "parallel", "opposing", "small", "large"]))
        other = draw(st.integers(0, tasks - 1))
        rows[i] = {
            "as it is": rows[i],
            "zero": 0 * rows[i],
            "parallel": 3 * rows[other],
            "opposing": -2 * rows[other],
            "small": 1e-3 * rows[i],
            "large": 1e3 * rows[i],
        }[kind]
    return rows


def norms(rows: Tensor) -> Tensor:
    return rows.norm(dim=1)


def no_conflict(rows: Tensor, weights: Tensor, slack: float = 1e-9) -> bool:
    """Whether the update has no negative inner product with a gradient, but for a share of the largest numbers."""
    return bool((rows @ (weights @ rows) >= -slack * norms(rows) * norms(rows).max() * weights.abs().max()).all())


def same_update(rows: Tensor, weights: Tensor, others: Tensor, slack: float = 1e-9) -> bool:
    """Whether two weightings give the same update, but for a share of the largest numbers."""
    largest = torch.maximum(weights.abs(), others.abs()).max()
    return bool(((weights - others) @ rows).norm() <= slack * largest * norms(rows).max())


def by_enumeration(gram: np.ndarray, least: np.ndarray) -> np.ndarray:
    """The v >= least with the least v' gram v, by trying all 2^T sets of bounds that hold with equality."""
    tasks = len(gram)
    for mask in range(2**tasks):
        free = np.array([mask >> i & 1 for i in range(tasks)], dtype=bool)
        v = least.copy()
        if free.any():
            v[free] = -np.linalg.solve(gram[np.ix_(free, free)], gram[np.ix_(free, ~free)] @ least[~free])
        if (v >= least - 1e-12).all() and (gram @ v)[~free].min(initial=0) >= -1e-12:
            return v
    raise AssertionError("no set of bounds fits")
