"""Task losses, and SMART's divergences between two outputs: means over a batch, in float32.

A loss takes a head's outputs, the labels [n], and the largest label there is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minbert.tasks import Task


def cross_entropy(logits: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """logits [n, C]; labels are whole numbers in any dtype."""
    return F.cross_entropy(_wide(logits), labels.long())


def binary_cross_entropy(logits: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """logits [n], of the label's share of `top`: a class of two, or how high a score is."""
    wide = _wide(logits)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype) / top)


def mean_squared_error(scores: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """scores [n]."""
    wide = _wide(scores)
    return F.mse_loss(wide, labels.to(wide.dtype))


def cosine_embedding(cosines: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """1 - cos for similar pairs, max(0, cos) for the others; cosines [n].

    Similar are those with a label above half of `top`: paraphrases, and scores above 2.5 of 5 (003, section 3; 004,
    experiment 2a). Neither paper gives a margin; it is 0, as in PyTorch.
    """
    wide = _wide(cosines)
    return torch.where(labels > top / 2, 1 - wide, wide.clamp(min=0)).mean()


def multiple_negatives_ranking(scores: Tensor, labels: Tensor, top: float = 1.0) -> Tensor:
    """-1/K sum_i (S(x_i, y_i) - log sum_j exp S(x_i, y_j)) over the batch's K positive pairs (003, section 3).

    Positive are labels above half of `top`; the other pairs are left out, and without any positive one the loss is 0.

    Args:
        scores: S [n, n], of the first sentence of each pair with the second of each: what the task's head gives the
            two, for the paper calls S "the scoring function of the distance" and names no other.
    """
    wide, positive = _wide(scores), labels > top / 2
    itself = torch.eye(len(wide), dtype=torch.bool, device=wide.device)  # keeps the others' sums finite
    candidates = wide.masked_fill(~(positive | itself), -torch.inf)
    losses = candidates.logsumexp(1) - wide.diagonal()
    return torch.where(positive, losses, 0.0).sum() / positive.sum().clamp(min=1)


def symmetrised_kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) of the classes' probabilities (Jiang et al. 2019, section 3); both [n, C]."""
    p, q = F.log_softmax(_wide(logits), -1), F.log_softmax(_wide(other), -1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


def symmetrised_binary_kl(logits: Tensor, other: Tensor) -> Tensor:
    """`symmetrised_kl` of two classes, from the logits of the second; both [n]."""
    p, q = _wide(logits), _wide(other)
    return ((p.sigmoid() - q.sigmoid()) * (p - q)).mean()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
    "cosine_embedding": cosine_embedding,
    "multiple_negatives_ranking": multiple_negatives_ranking,
}
# By the task's loss, how far apart two of its outputs are.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": symmetrised_kl,
    "binary_cross_entropy": symmetrised_binary_kl,
    "mean_squared_error": mean_squared_error,
    "cosine_embedding": mean_squared_error,
    "multiple_negatives_ranking": symmetrised_kl,  # of each first sentence's choice among the batch's second ones
}


def losses_for(task: Task) -> list[str]:
    """The losses that fit a task's labels."""
    if task.top > 1 and not task.is_scored:
        return ["cross_entropy"]
    of_pairs = ["cosine_embedding", "multiple_negatives_ranking"] if task.is_pair else []
    return ["binary_cross_entropy", *(["mean_squared_error"] if task.is_scored else []), *of_pairs]
