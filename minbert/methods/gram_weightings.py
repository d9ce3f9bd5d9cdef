"""Rules that weight the tasks by the Gram matrix of their gradients, each with its paper, formula and promises.

G is the Gram matrix, g_i the gradient of task i, w the weights, T the number of tasks; the update is the sum of w_i
g_i. Weights of "the same scale" do not change where all gradients are multiplied by one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minbert.errors import require
from minbert.methods.weighting_base import Weighting, moved


@dataclass(frozen=True)
class UPGrad(Weighting):
    """Jacobian Descent for Multi-Objective Optimization (Quinton and Rey 2024).

    Each gradient is projected on the cone of the directions that conflict with no gradient; the update is the mean of
    the projections. w = sum over i of the v >= e_i / T with the least v' (G / trace(G) + eps I) v.
    Promises: no conflict with any task (G w >= 0, but for eps); w >= 1 / T; the same scale; multiplying one gradient by
    c multiplies what it adds to the update by c (but for eps).

    Attributes:
        eps: makes the solution unique, and finite for opposing gradients.
    """

    rule: ClassVar[str] = "upgrad"
    eps: float = 1e-4


@dataclass(frozen=True)
class DualProj(Weighting):
    """Gradient Episodic Memory for Continual Learning (Lopez-Paz and Ranzato 2017), equation 11, for tasks of one step.

    The mean gradient, projected on the cone of the directions that conflict with no gradient: the w >= 1 / T with the
    least w' (G / trace(G) + eps I) w.
    Promises: no conflict with any task (but for eps); w >= 1 / T; the same scale; the mean where no gradients conflict.

    Attributes:
        eps: makes the solution unique, and finite for opposing gradients.
    """

    rule: ClassVar[str] = "dualproj"
    eps: float = 1e-4


@dataclass(frozen=True)
class MGDA(Weighting):
    """Multiple-gradient descent algorithm (Desideri 2012; Sener and Koltun 2018).

    The shortest vector in the convex hull of the gradients: the w >= 0 with sum 1 and the least w' G w, exactly.
    Promises: no conflict with any task, as G w >= w' G w; w >= 0 with sum 1; the same scale; no longer than the
    shortest gradient, so a task whose gradient is small holds all others up, and one without a gradient stops them.
    """

    rule: ClassVar[str] = "mgda"


@dataclass(frozen=True)
class CAGrad(Weighting):
    """Conflict-Averse Gradient Descent for Multi-task Learning (Liu et al. 2021).

    Of all updates within c |g_0| of the mean gradient g_0, the one whose least inner product with a gradient is
    largest: g_0 + c |g_0| g_w / |g_w|, with w on the simplex and the least g_w' g_0 + c |g_0| |g_w|. Zero weights where
    |g_w| is below 1e-4 of the root of trace(G), as with a gradient of 0: nothing helps all tasks.
    Promises: converges to where the mean is stationary for c < 1; conflicts with no task for c >= 1; w >= 0; the same
    scale.

    Attributes:
        c: 0 gives the mean, a large one MGDA's direction.
    """

    rule: ClassVar[str] = "cagrad"
    c: float = 0.4


@dataclass(frozen=True)
class IMTLG(Weighting):
    """IMTL-G, of Towards Impartial Multi-task Learning (Liu et al. 2021).

    With a pseudo-inverse as in Quinton and Rey 2024: v = pinv(G) sqrt(diag(G)), w = v / sum(v); 1 / T each where that
    sum cancels.
    Promises (independent gradients): the update has the same projection on every gradient; the sum of w is 1, w may be
    negative; the same scale; rescaled losses change the length of the update and not its direction.
    """

    rule: ClassVar[str] = "imtl-g"


@dataclass(frozen=True)
class AlignedMTL(Weighting):
    """Independent Component Alignment for Multi-Task Learning (Senushkin et al. 2023).

    The gradients are replaced by orthogonal ones of one length, nearest to them; the update is the mean of these. With
    the eigenvalues lambda_k and eigenvectors V of G, w = sqrt(lambda) V diag(lambda_k)^(-1/2) V' 1 / T.
    Promises: the condition number of the gradients that are averaged is 1; the same scale; w may be negative.

    Attributes:
        mode: which lambda: "min", the least eigenvalue; "median", the lower one; "rmse", the mean of all.
    """

    rule: ClassVar[str] = "aligned-mtl"
    mode: str = "min"

    MODES: ClassVar[tuple[str, ...]] = ("min", "median", "rmse")

    def __post_init__(self) -> None:
        require(self.mode in self.MODES, "surgery.mode", "min, median or rmse", self.mode)

    @property
    def options(self) -> list[float]:
        return [float(self.MODES.index(self.mode))]


@dataclass(frozen=True)
class NashMTL(Weighting):
    """Multi-Task Learning as a Bargaining Game (Navon et al. 2022).

    The w > 0 with (G / |G|) w = 1 / w (Frobenius norm), exactly; the update is then scaled to a norm of at most
    `max_norm`. A gradient of 0 has a weight of 0.
    Promises: every task gains the same share, w_i (G w)_i is the same for all, so the update conflicts with no task;
    w > 0; rescaled losses change at most the length of the update.

    Attributes:
        max_norm: of the update before it is clipped with the gradients of one task alone; 0 for no scaling.
        every: the weights are solved for anew at each `every`-th step.
    """

    rule: ClassVar[str] = "nash-mtl"
    reduction: ClassVar[str] = "sum"
    max_norm: float = 1.0
    every: int = 1


@dataclass(frozen=True)
class ConFIG(Weighting):
    """ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks (Liu et al. 2024).

    The direction u that has the same angle with every gradient, as long as the gradients' projections on it together:
    with the cosines C and x = pinv(C) 1, w_i = (sum of g_j u) x_i / (|g_i| sqrt(x' C x)).
    Promises (independent gradients): the same cosine above 0 with every gradient, so no conflict; the same scale;
    rescaled losses change the length of the update and not its direction. Opposing gradients and gradients of 0 get
    weights of 0.
    """

    rule: ClassVar[str] = "config"
    reduction: ClassVar[str] = "sum"


@dataclass(frozen=True)
class GradVac(Weighting):
    """Gradient Vaccine (Wang et al. 2021).

    PCGrad with a target: gradient i meets the others in a random order, and where its cosine with j is below phi_ij, a
    moving average of that cosine, it gets a multiple of g_j that makes it phi_ij.
    Promises: with beta 0 PCGrad to rounding; w >= 1 while all phi are at least 0; the same scale. State: phi.

    Attributes:
        beta: the share of the newest cosine in phi.
    """

    rule: ClassVar[str] = "gradvac"
    reduction: ClassVar[str] = "sum"
    beta: float = 0.5


@dataclass(frozen=True)
class FairGrad(Weighting):
    """Fair Resource Allocation in Multi-Task Learning (Ban and Ji 2024).

    The w > 0 with G w = w^(-1 / alpha), exactly: what tasks gain is alpha-fair. A gradient of 0 has a weight of 0.
    Promises: no conflict with any task; w > 0; with alpha 1 Nash-MTL's direction and a norm of sqrt(T). Gradients that
    are c times as long give an update of c^((1 - alpha) / (1 + alpha)) times the length.

    Attributes:
        alpha: 0 gives the mean, 1 proportional fairness, a large one favours the worst task.
    """

    rule: ClassVar[str] = "fairgrad"
    alpha: float = 1.0


@dataclass(frozen=True)
class RandomWeights(Weighting):
    """Reasonable Effectiveness of Random Weighting (Lin et al. 2022), RLW: the softmax of standard normal numbers.

    Promises: w > 0 with sum 1, and 1 / T on average: a stochastic mean, to compare other rules with.
    """

    rule: ClassVar[str] = "random"


@dataclass(frozen=True)
class Constant(Weighting):
    """Given weights, one for each task in the order of the tasks.

    Attributes:
        values: finite numbers.
    """

    rule: ClassVar[str] = "constant"
    reduction: ClassVar[str] = "sum"
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = isinstance(self.values, list | tuple) and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in self.values
        )
        ok = numbers and len(self.values) > 0 and bool(torch.tensor(self.values, dtype=torch.float64).isfinite().all())
        require(ok, "surgery.values", "a list of a finite number for each task", self.values)
        object.__setattr__(self, "values", tuple(map(float, self.values)))

    @property
    def options(self) -> list[float]:
        return list(self.values)

    def state(self, tasks: int, parts: int | None = None, device: torch.device | str = "cpu") -> Tensor | None:
        require(len(self.values) == tasks, "surgery.values", f"{tasks} numbers, one for each task", list(self.values))
        return None

    def weights(
        self,
        gram: Tensor,
        losses: Tensor | None = None,
        state: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        require(len(self.values) == gram.shape[-1], "surgery.values", f"{gram.shape[-1]} numbers", list(self.values))
        return moved(torch.tensor(self.values, dtype=torch.float64), gram.device).expand(gram.shape[:-1]).contiguous()
