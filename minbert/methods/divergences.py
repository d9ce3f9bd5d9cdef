"""Divergences between two outputs of a model, differentiable in both and computed in float32 or float64.

SMART compares a task's outputs by the divergence of its loss (`DIVERGENCES`), a mean over the batch; virtual
adversarial training takes the one from clean outputs that count as constant (`KL_DIVERGENCES`). `kl_loss`,
`sym_kl_loss` and `js_loss` have the names and arguments of smart-pytorch's, for `minbert.integrations.SMARTLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minbert.methods.losses import at_least_float32, mean_squared_error


def symmetrised_kl(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) of the classes' probabilities (Jiang et al. 2019, section 3); both [n, C]."""
    p, q = _log_softmax(logits), _log_softmax(other)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()


def symmetrised_binary_kl(logits: Tensor, other: Tensor) -> Tensor:
    """`symmetrised_kl` of two classes, from the logits of the second; both [n].

    Of a multi-label task, [n, C], each class is such a pair; the divergence is the mean over the classes too, as the
    loss is, so that SMART and Bregman weigh as much against the loss whatever the number of classes.
    """
    p, q = at_least_float32(logits), at_least_float32(other)
    return ((p.sigmoid() - q.sigmoid()) * (p - q)).mean()


# By the task's loss.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": symmetrised_kl,
    "binary_cross_entropy": symmetrised_binary_kl,
    "mean_squared_error": mean_squared_error,
    "cosine_embedding": mean_squared_error,
    "multiple_negatives_ranking": symmetrised_kl,  # of each first sentence's softmax over the batch's second sentences
}


def binary_kl(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(clean || logits) of two classes, as in `symmetrised_binary_kl`; no gradient for `clean`."""
    p, q = at_least_float32(clean.detach()), at_least_float32(logits)
    log_ratios = F.logsigmoid(p) - F.logsigmoid(q), F.logsigmoid(-p) - F.logsigmoid(-q)
    return (p.sigmoid() * log_ratios[0] + (-p).sigmoid() * log_ratios[1]).mean()


def _kl_from(logits: Tensor, clean: Tensor) -> Tensor:
    return kl_loss(logits, clean.detach())


def _squared_distance_from(scores: Tensor, clean: Tensor) -> Tensor:
    return mean_squared_error(scores, clean.detach())


# By the task's loss, of outputs and of clean outputs that count as constant.
KL_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": _kl_from,
    "binary_cross_entropy": binary_kl,
    "mean_squared_error": _squared_distance_from,
    "cosine_embedding": _squared_distance_from,
    "multiple_negatives_ranking": _kl_from,
}


def kl_loss(input: Tensor, target: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL(target || input) of the distributions with logits [..., C].

    Args:
        reduction: that of torch.nn.functional.kl_div, as in the functions below.
    """
    return _kl(_log_softmax(target), _log_softmax(input), reduction)


def sym_kl_loss(input: Tensor, target: Tensor, reduction: str = "sum", alpha: float = 1.0) -> Tensor:
    """alpha KL(target || input) + KL(input || target), SMART's for classification (Jiang et al. 2019, section 3).

    smart-pytorch's has the same value, but treats the probabilities that weigh each logarithm as constants.
    """
    log_p, log_q = _log_softmax(input), _log_softmax(target)
    return alpha * _kl(log_q, log_p, reduction) + _kl(log_p, log_q, reduction)


def js_loss(input: Tensor, target: Tensor, reduction: str = "sum", alpha: float = 1.0) -> Tensor:
    """alpha times the Jensen-Shannon divergence (Lin 1991), at most alpha log 2 per distribution.

    smart-pytorch's function of that name adds the two divergences of the mean from either distribution, unhalved, with
    the mean as a constant; that sum has no upper bound.
    """
    log_p, log_q = _log_softmax(input), _log_softmax(target)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    return alpha * 0.5 * (_kl(log_p, log_mean, reduction) + _kl(log_q, log_mean, reduction))


def _kl(log_p: Tensor, log_q: Tensor, reduction: str) -> Tensor:
    """KL(p || q)."""
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(at_least_float32(logits), -1)
