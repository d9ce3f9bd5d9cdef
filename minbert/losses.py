"""Task losses, and SMART's divergences between two outputs: means over a batch, in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [n, C]; labels [n], whole numbers in any dtype."""
    return F.cross_entropy(_wide(logits), labels.long())


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [n]; labels [n], 0 or 1."""
    wide = _wide(logits)
    return F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype))


def mean_squared_error(scores: Tensor, labels: Tensor) -> Tensor:
    """scores [n]; labels [n]."""
    wide = _wide(scores)
    return F.mse_loss(wide, labels.to(wide.dtype))


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


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
}
# By the task's loss, how far apart two of its outputs are.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": symmetrised_kl,
    "binary_cross_entropy": symmetrised_binary_kl,
    "mean_squared_error": mean_squared_error,
}
