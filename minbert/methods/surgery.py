"""Gradient surgery: from the Gram matrix of the task gradients to one weight for each of them.

A surgery is a function `weights(gram, generator)`; whatever it is, the update is the weighted sum of the gradients. So
no surgery reads a gradient: the T x T numbers that `minbert.kernels.gram` gives are all it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minbert import kernels
from minbert.errors import UserError, did_you_mean
from minbert.methods.user_weighting import UserWeighting, check_reference


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
    orders = torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)])
    return orders if device.type == "cpu" else orders.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Surgery:
    """How the tasks' gradients become one update."""

    name: str
    projects: bool = False  # whether the weights are PCGrad's
    weighting: UserWeighting | None = None
    reduction: str = "sum"  # of the (projected) gradients, where there is no weighting: "sum" or "mean"
    per_task: bool = True  # whether it needs the tasks' gradients apart; if not, T is 1 whatever the tasks

    def weights(
        self,
        gram: Tensor,
        generator: torch.Generator,
        own_square: Tensor,
        max_norm: float,
        agree: Callable[[Tensor], Tensor] = lambda weights: weights,
    ) -> tuple[Tensor, Tensor]:
        """Clipped weights [T], and what else `kernels.surgery_weights` says of them.

        Waits for no device, except to call a weighting of the user's.

        Args:
            gram: float64 [T, T].
            generator: what a random order follows.
            own_square, max_norm: as for `kernels.surgery_weights`.
            agree: gives all processes one's weights; only a user's weighting could give each process others.
        """
        orders = _orders(len(gram), generator, gram.device) if self.projects else None
        weights = agree(self.weighting(gram, generator)) if self.weighting is not None else None
        return kernels.surgery_weights(
            gram, orders=orders, weights=weights, reduction=self.reduction, own_square=own_square, max_norm=max_norm
        )


_SUM, _MEAN = Surgery("sum", per_task=False), Surgery("mean", reduction="mean")
_PCGRAD = {reduction: Surgery("pcgrad", projects=True, reduction=reduction) for reduction in ("sum", "mean")}
NAMES = ("sum", "mean", "pcgrad", "gse")


def names_code(name: str) -> bool:
    """Whether a surgery is a MODULE:NAME, which is imported and called."""
    return ":" in name


def check_surgery(name: str) -> None:
    """Check the name of a surgery, or the form of a MODULE:NAME. Imports nothing.

    Raises:
        UserError: an unknown name, or another form.
    """
    if names_code(name):
        check_reference(name)
    elif name not in NAMES:
        raise UserError(
            f"--surgery {name}: unknown{did_you_mean(name, NAMES)}; expected {', '.join(NAMES)}, or MODULE:NAME of a"
            " callable from Gram matrix to weights"
        )


def needs_task_gradients(name: str) -> bool:
    """Whether a surgery needs the tasks' gradients apart, and so a batch of every task in each step."""
    return name not in ("sum", "mean")


def find_surgery(name: str, reduction: str = "sum") -> list[Surgery]:
    """The updates of one step: one for most surgeries, two for "gse". Imports the module of a MODULE:NAME.

    GSE (paper 004) updates with the mean of PCGrad's gradients, and at once again with the gradient of the tasks'
    summed loss at the new parameters.

    Args:
        name: "sum", "mean", "pcgrad", "gse", or "MODULE:NAME": a callable from Gram matrix to weights, or a class of
            such, as TorchJD's weightings are; "MODULE:NAME(0.4, norm_eps=1e-4)" calls it first, with Python's literals.
            Such a name is code: pass none on from a file that is not trusted.
        reduction: of "pcgrad".

    Raises:
        UserError: an unknown name, nothing callable there, or one whose state cannot be saved.
    """
    check_surgery(name)
    known = {"sum": [_SUM], "mean": [_MEAN], "pcgrad": [_PCGRAD[reduction]], "gse": [_PCGRAD["mean"], _SUM]}
    return known[name] if name in known else [Surgery(name, weighting=UserWeighting(name))]


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
