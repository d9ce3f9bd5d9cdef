"""Attention within each sequence of a packed stream."""

from __future__ import annotations

from torch import Tensor

from . import checks, reference
from .random import attention_dropout_mask


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    softmax_scale: float | None = None,
) -> Tensor:
    """Softmax attention of every token to the tokens of its own sequence (Vaswani et al. 2017, section 3.2).

    Args:
        qkv: float [N, 3, H, d], the tokens' queries, keys and values.
        cu_seqlens: int32 [S + 1], cumulative sequence lengths from 0 to N.
        max_seqlen: the longest sequence's length in tokens.
        dropout_p: the probability of dropping an attention probability, in [0, 1).
        seed, site: as for `dropout_mask`; needed when dropout_p > 0.
        softmax_scale: what the scores are multiplied by; 1 / sqrt(d) when left out.

    Returns:
        [N, H, d].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("attention", "qkv", qkv, ["N", 3, "H", "d"], checks.FLOATS)
    checks.dropout("attention", dropout_p, seed, site, qkv.device)
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"attention: cu_seqlens must be on {qkv.device} like qkv, got {cu_seqlens.device}")
    checks.cu_seqlens("attention", cu_seqlens, qkv.shape[0], max_seqlen)
    keep = None
    if dropout_p > 0 and seed is not None:
        keep = attention_dropout_mask(cu_seqlens, qkv.shape[2], dropout_p, seed, site)
    scale = qkv.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    return reference.attention(qkv, cu_seqlens, keep, dropout_p, scale)
