"""Task losses: means over a batch, computed in float32 or float64.

A loss takes a head's outputs, the labels [n], and the largest possible label, `top`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minbert.tasks import Task


def cross_entropy(logits: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """logits [n, C]; labels are whole numbers in any dtype."""
    return F.cross_entropy(at_least_float32(logits), labels.long())


def binary_cross_entropy(logits: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """logits [n], of the probability label / top: of class 1 of two, or a score relative to the largest."""
    wide = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype) / top)


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


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
    "cosine_embedding": cosine_embedding,
    "multiple_negatives_ranking": multiple_negatives_ranking,
}


def losses_for(task: Task) -> list[str]:
    """The losses that fit a task's labels."""
    if task.max_label > 1 and not task.is_regression:
        return ["cross_entropy"]
    of_pairs = ["cosine_embedding", "multiple_negatives_ranking"] if task.is_pair else []
    return ["binary_cross_entropy", *(["mean_squared_error"] if task.is_regression else []), *of_pairs]
