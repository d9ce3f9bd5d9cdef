"""Bias and GELU: what follows the first product of a feed-forward block."""

from __future__ import annotations

from torch import Tensor

from . import checks, reference


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) with the exact error function (Hendrycks and Gimpel 2016).

    Args:
        x: float [N, D].
        bias: float [D].

    Returns:
        [N, D], of x's dtype.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("bias_gelu", "x", x, ["N", "D"], checks.FLOATS)
    checks.tensor("bias_gelu", "bias", bias, x.shape[1:], checks.FLOATS, like=x)
    return reference.bias_gelu(x, bias)
