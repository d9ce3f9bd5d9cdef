"""Task losses: means over a batch, computed in float32 or float64.

A loss takes a head's outputs, the labels [n], or [n, C] of a multi-label task, and the largest possible label, `top`.
A loss of classes also takes `class_weights` and `label_smoothing`; they are passed only where a run has some.

The batch that a mean is taken over is one of the task's, whole even where several processes share it; each of several
accumulated batches has a mean of its own, and the update takes the mean of these. So a mean that is weighted by classes
is that of each batch: the weighted mean of an accumulated batch of twice the size is another number, unless both
batches have the same sum of weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minbert.tasks import Task

OF_CLASSES = ("class_weights", "label_smoothing")  # what a loss of classes takes besides


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    top: float = 1.0,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """PyTorch's cross-entropy.

    Args:
        logits: [n, C].
        labels: whole numbers in any dtype, [n].
        class_weights: of the classes, [C]: the mean over the batch is weighted by those of the labels.
        label_smoothing: share of each target that is spread evenly over all classes (Szegedy et al. 2016, section 7).
    """
    wide = at_least_float32(logits)
    return F.cross_entropy(wide, labels.long(), class_weights, label_smoothing=label_smoothing)


def binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    top: float = 1.0,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy of one logit; of a multi-label task the mean over examples and classes.

    Args:
        logits: [n], of the probability label / top: of class 1 of two, or a score relative to the largest; or [n, C].
        labels: shaped like `logits`.
        class_weights: of two classes [2], as in `cross_entropy` of the logits 0 and `logits`; of a multi-label task
            [C], what multiplies the loss of an example that has the class (PyTorch's `pos_weight`).
        label_smoothing: s takes targets y to y (1 - s) + s / 2, as in `cross_entropy` of two classes.
    """
    wide = at_least_float32(logits)
    if class_weights is not None and logits.ndim == 1:
        both = torch.stack([torch.zeros_like(wide), wide], -1)
        return cross_entropy(both, labels, class_weights=class_weights, label_smoothing=label_smoothing)
    targets = labels.to(wide.dtype) / top
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(wide, targets, pos_weight=class_weights)


def mean_squared_error(scores: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """scores [n]."""
    wide = at_least_float32(scores)
    return F.mse_loss(wide, labels.to(wide.dtype))


def cosine_embedding(cosines: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """1 - cos for similar pairs, max(0, cos) for the others; cosines [n].

    Pairs with a label above half of `top` are similar: paraphrases, and scores above 2.5 of 5 (003, section 3; 004,
    experiment 2a). Neither paper gives a margin; it is 0, as in PyTorch.
    """
    wide = at_least_float32(cosines)
    return torch.where(labels > top / 2, 1 - wide, wide.clamp(min=0)).mean()


def multiple_negatives_ranking(scores: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """-1/K sum_i (S(x_i, y_i) - log sum_j exp S(x_i, y_j)) over the batch's K positive pairs (003, section 3).

    Pairs with a label above half of `top` are positive. The other pairs are left out; without positive pairs the loss
    is 0.

    Args:
        scores: S [n, n], the task head's output for the first sentence of each pair with the second sentence of each;
            the paper calls S "the scoring function of the distance" and names no other.
    """
    wide, positive = at_least_float32(scores), labels > top / 2
    itself = torch.eye(len(wide), dtype=torch.bool, device=wide.device)  # keeps the others' sums finite
    candidates = wide.masked_fill(~(positive | itself), -torch.inf)
    losses = candidates.logsumexp(1) - wide.diagonal()
    return torch.where(positive, losses, 0.0).sum() / positive.sum().clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
    "cosine_embedding": cosine_embedding,
    "multiple_negatives_ranking": multiple_negatives_ranking,
}


def losses_for(task: Task) -> list[str]:
    """The losses that fit a task's labels; while its classes are not known, those that may."""
    if task.is_multilabel:
        return ["binary_cross_entropy"]
    of_pairs = ["cosine_embedding", "multiple_negatives_ranking"] if task.is_pair else []
    if task.is_regression:
        return ["binary_cross_entropy", "mean_squared_error", *of_pairs]
    if task.classes is None:
        return ["cross_entropy", "binary_cross_entropy", *of_pairs]
    return ["binary_cross_entropy", *of_pairs] if task.num_classes == 2 else ["cross_entropy"]


def accepts(loss: str, option: str) -> bool:
    """Whether a loss takes one of `OF_CLASSES`."""
    return option in inspect.signature(LOSSES[loss]).parameters
