"""Dropout, residual and layer norm: what follows each half of a BERT layer."""

from __future__ import annotations

from torch import Tensor

from . import checks, reference
from .random import mask_like


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension.

    Args:
        x, residual: float [N, D], of one dtype.
        weight, bias: float [D].
        eps: added to the variance.
        dropout_p, seed, site: as for `dropout_mask`; `seed` is needed when dropout_p > 0.

    Returns:
        [N, D], of x's dtype.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "dropout_add_layer_norm"
    checks.tensor(op, "x", x, ["N", "D"], checks.FLOATS)
    checks.tensor(op, "residual", residual, x.shape, [x.dtype], like=x)
    checks.tensor(op, "weight", weight, x.shape[1:], checks.FLOATS, like=x)
    checks.tensor(op, "bias", bias, x.shape[1:], checks.FLOATS, like=x)
    checks.dropout(op, dropout_p, seed, site, x.device)
    keep = mask_like(x, dropout_p, seed, site)
    return reference.dropout_add_layer_norm(x, residual, weight, bias, keep, dropout_p, eps)
