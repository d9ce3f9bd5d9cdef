"""Rules that weight the tasks by their losses, each with its paper, formula and promises.

l_i is the loss of task i, w the weights, T the number of tasks; the update is the sum of w_i times the gradient of l_i.
Each has a state for all of its history, and GradNorm alone reads the gradients' norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from minbert.methods.weighting_base import Weighting


@dataclass(frozen=True)
class FAMO(Weighting):
    """FAMO: Fast Adaptive Multitask Optimization (Liu et al. 2023).

    With z = softmax(logits), w_i = (z_i / l_i) / sum(z_j / l_j). The logits learn by Adam to raise the weight of tasks
    whose log loss falls slowly. Here the losses after an update are those of the next step, of other examples, where
    the paper computes the losses of the same examples again: no further forward, but noise.
    A loss counts as max(loss, 0) + 1e-8.
    Promises: w > 0 with sum 1; rescaled losses change the length of the update and not its direction.

    Attributes:
        lr: of the logits.
        weight_decay: L2, as torch.optim.Adam's.
    """

    rule: ClassVar[str] = "famo"
    lr: float = 0.025
    weight_decay: float = 0.001


@dataclass(frozen=True)
class Uncertainty(Weighting):
    """Multi-Task Learning Using Uncertainty to Weigh Losses (Kendall et al. 2018).

    The sum of exp(-s_i) l_i / 2 + s_i / 2 is minimised in s too, by Adam: w_i = exp(-s_i) / 2.
    Promises: w > 0; of constant losses w_i l_i goes to 1 / 2.

    Attributes:
        lr: of s.
    """

    rule: ClassVar[str] = "uncertainty"
    reduction: ClassVar[str] = "sum"
    lr: float = 0.01


@dataclass(frozen=True)
class DWA(Weighting):
    """Dynamic weight average, of End-to-End Multi-Task Learning with Attention (Liu et al. 2019).

    w_i = T softmax(r / temperature)_i, with r_i the mean loss of the last `every` steps divided by that of the `every`
    steps before; 1 in the first two windows.
    Promises: w > 0 with sum T; rescaled losses do not change w; tasks whose losses fall equally fast have equal
    weights.

    Attributes:
        temperature: a large one gives equal weights.
        every: steps of a window, in place of the paper's epochs.
    """

    rule: ClassVar[str] = "dwa"
    reduction: ClassVar[str] = "sum"
    temperature: float = 2.0
    every: int = 100

    def remark(self, steps: int) -> str | None:
        if steps > 2 * self.every:
            return None
        return f"all weights are 1 in its first {2 * self.every} steps: it is sum here; give a smaller --surgery.every"


@dataclass(frozen=True)
class GradNorm(Weighting):
    """GradNorm: Gradient Normalization for Adaptive Loss Balancing (Chen et al. 2018).

    w starts at 1 and learns by Adam to bring each w_i |g_i| to mean(w |g|) r_i^alpha, where r_i is the loss relative to
    the first, divided by the mean of these: tasks that are behind get longer gradients. The norms are of whole
    gradients, where the paper takes the last shared layer's.
    Promises: w > 0 with sum T; of constant gradients with alpha 0 all w_i |g_i| become equal.

    Attributes:
        alpha: how strongly tasks that are behind are favoured.
        lr: of w.
    """

    rule: ClassVar[str] = "gradnorm"
    reduction: ClassVar[str] = "sum"
    alpha: float = 1.5
    lr: float = 0.025


@dataclass(frozen=True)
class GeometricMean(Weighting):
    """The geometric loss strategy of MultiNet++ (Chennupati et al. 2019).

    The update is the gradient of the geometric mean of the losses: w_i = (l_1 ... l_T)^(1 / T) / (T l_i), where a loss
    counts as at least 1e-8.
    Promises: w > 0, w_i l_i is the same for all; rescaled losses change the length of the update and not its direction.
    """

    rule: ClassVar[str] = "geometric-mean"
