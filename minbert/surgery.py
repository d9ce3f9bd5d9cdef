"""Gradient surgery: from the Gram matrix of the task gradients to one weight for each of them.

A surgery is a function `weights(gram, generator)`; whatever it is, the update is the weighted sum of the gradients. So
no surgery reads a gradient: the T x T numbers that `minbert.kernels.gram` gives are all it needs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minbert import kernels
from minbert.errors import UserError, did_you_mean
from minbert.transfer import moved

Weighting = Callable[[Tensor], Tensor]  # gram [T, T] -> weights [T], as TorchJD's weightings are


def sum_weights(gram: Tensor) -> Tensor:
    """The plain sum of the gradients: a weight of 1 each, float64 [T]."""
    return gram.new_ones(len(gram))


def mean_weights(gram: Tensor) -> Tensor:
    """The mean of the gradients: a weight of 1 / T each, float64 [T]."""
    return gram.new_full((len(gram),), 1 / len(gram))


def pcgrad_weights(gram: Tensor, generator: torch.Generator | None = None, reduction: str = "sum") -> Tensor:
    """PCGrad's weights (Yu et al. 2020, algorithm 1), by projecting coefficients of gradients instead of gradients.

    Each task's gradient walks the other tasks' in a random order of its own, and where it conflicts with one (their
    inner product is negative) loses its component along that one's original gradient.

    Args:
        gram: float64 [T, T], the inner products of the task gradients. If one of them is not finite, no gradient is
            projected: the sum is not finite either, and whoever updates with it has to tell.
        generator: for the T orders, each a `torch.randperm(T)`; torch's default generator when left out.
        reduction: "sum" of the projected gradients, as in the paper, or their "mean".

    Returns:
        float64 [T], on gram's device.

    Raises:
        ValueError: gram is not square, or an unknown reduction.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"pcgrad_weights: gram must be [T, T], got {list(gram.shape)}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"pcgrad_weights: reduction must be 'sum' or 'mean', got {reduction!r}")
    orders = _orders(len(gram), generator, gram.device)
    return kernels.surgery_weights(gram.double(), orders=orders, reduction=reduction)[0]


def _orders(tasks: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A random order of the tasks for each of them, int64 [T, T]."""
    return moved([torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)])], device)[0]


@dataclass(frozen=True)
class Surgery:
    """How the tasks' gradients become one update."""

    name: str
    projects: bool = False  # whether the weights are PCGrad's
    weighting: Callable[[Tensor, torch.Generator], Tensor] | None = None  # gram float64 [T, T] -> weights [T]
    reduction: str = "sum"  # of the (projected) gradients, where there is no weighting: "sum" or "mean"
    per_task: bool = True  # whether it needs the tasks' gradients apart; if not, T is 1 whatever the tasks

    def weights(
        self, gram: Tensor, generator: torch.Generator, own_square: Tensor, max_norm: float
    ) -> tuple[Tensor, Tensor]:
        """Clipped weights [T], and what else `kernels.surgery_weights` says of them. Waits for no device.

        Args:
            gram: float64 [T, T].
            generator: what a random order follows.
            own_square, max_norm: as for `kernels.surgery_weights`.
        """
        orders = _orders(len(gram), generator, gram.device) if self.projects else None
        weights = self.weighting(gram, generator) if self.weighting is not None else None
        return kernels.surgery_weights(
            gram, orders=orders, weights=weights, reduction=self.reduction, own_square=own_square, max_norm=max_norm
        )


_SUM, _MEAN = Surgery("sum", per_task=False), Surgery("mean", reduction="mean")
_PCGRAD = {reduction: Surgery("pcgrad", projects=True, reduction=reduction) for reduction in ("sum", "mean")}
NAMES = ("sum", "mean", "pcgrad", "gse")


def find_surgery(name: str, reduction: str = "sum") -> list[Surgery]:
    """The updates of one step: one for most surgeries, two for "gse".

    GSE (paper 004) updates with the mean of PCGrad's gradients, and at once again with the gradient of the tasks'
    summed loss at the new parameters.

    Args:
        name: "sum", "mean", "pcgrad", "gse", or "MODULE:NAME": a callable from Gram matrix to weights, or a class of
            such, as TorchJD's weightings are.
        reduction: of "pcgrad".

    Raises:
        UserError: an unknown name, or nothing callable there.
    """
    known = {"sum": [_SUM], "mean": [_MEAN], "pcgrad": [_PCGRAD[reduction]], "gse": [_PCGRAD["mean"], _SUM]}
    if name in known:
        return known[name]
    if ":" not in name:
        raise UserError(
            f"--surgery {name}: unknown{did_you_mean(name, NAMES)}; expected {', '.join(NAMES)}, or MODULE:NAME of a"
            " callable from Gram matrix to weights"
        )
    module, _, attribute = name.partition(":")
    try:
        weighting = getattr(importlib.import_module(module), attribute)
        weighting = weighting() if isinstance(weighting, type) else weighting
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"--surgery {name}: cannot be loaded ({error})") from None
    if not callable(weighting):
        raise UserError(f"--surgery {name}: expected a callable from Gram matrix to weights, got {weighting!r}")
    return [Surgery(name, weighting=functools.partial(_call, name, weighting))]


def _call(name: str, weighting: Weighting, gram: Tensor, generator: torch.Generator) -> Tensor:
    """Weights of a callable that takes no generator: torch's default one follows ours meanwhile.

    Raises:
        UserError: it raised, or gave something else than one number for each task.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        try:
            weights = weighting(gram)
        except Exception as error:
            problem = f"raised {type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"--surgery {name}: {problem}, for a Gram matrix {list(gram.shape)}") from error
    if not isinstance(weights, Tensor) or weights.shape != gram.shape[:1]:
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise UserError(f"--surgery {name}: must return a tensor of {len(gram)} weights, got {got}")
    return weights.to(gram)


@dataclass(frozen=True)
class Conflicts:
    """How task gradients disagree (two of Yu et al.'s tragic triad), and what a surgery did about it."""

    cosine: Tensor  # float64 [T, T]; NaN where a gradient is 0 or not finite
    magnitude_similarity: Tensor  # float64 [T, T]: 2 |a| |b| / (|a|^2 + |b|^2), 1 for equal norms
    projected_share: float  # |weighted sum - the surgery's own plain sum or mean| / |that plain sum or mean|

    @classmethod
    def of(cls, gram: Tensor, projected_share: float) -> Conflicts:
        """From a Gram matrix [T, T], and what `kernels.surgery_weights` says that surgery projected."""
        gram = gram.double().cpu()
        squares = gram.diagonal()
        norms = squares.sqrt()
        return cls(
            gram / torch.outer(norms, norms),
            2 * torch.outer(norms, norms) / (squares[:, None] + squares[None, :]),
            projected_share,
        )
