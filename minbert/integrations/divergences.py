"""Divergences between the distributions of two batches of logits, under the names smart-pytorch's users know."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_loss(input: Tensor, target: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL(target | input) of the distributions that logits [..., C] give, at least in float32.

    Differentiable in both. `reduction` is F.kl_div's, also below.
    """
    return _kl(_log_softmax(target), _log_softmax(input), reduction)


def sym_kl_loss(input: Tensor, target: Tensor, reduction: str = "sum", alpha: float = 1.0) -> Tensor:
    """alpha KL(target | input) + KL(input | target), SMART's for classification (Jiang et al. 2019, section 3).

    Differentiated in full; smart-pytorch treats the probabilities that weigh each logarithm as constants.
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
    """KL(p | q)."""
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
