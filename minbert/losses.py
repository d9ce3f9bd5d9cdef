"""Task losses: mean over a batch, in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [n, C]; labels [n], whole numbers in any dtype."""
    return F.cross_entropy(logits.float(), labels.long())


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [n]; labels [n], 0 or 1."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def mean_squared_error(scores: Tensor, labels: Tensor) -> Tensor:
    """scores [n]; labels [n]."""
    return F.mse_loss(scores.float(), labels.float())


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
}
