"""The ops of the encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import widened


def dropout(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """Zero what `keep` does not keep and scale the rest by 1 / (1 - p); `keep=None` changes nothing."""
    return x if keep is None else x * keep / (1 - p)


def attention(qkv: Tensor, cu_seqlens: Tensor, keep: Tensor | None, p: float, scale: float) -> Tensor:
    """Softmax attention within each sequence of a packed stream (Vaswani et al. 2017, section 3.2).

    Args:
        qkv: [N, 3, H, d].
        cu_seqlens: [S + 1].
        keep: `attention_dropout_mask`, or None without dropout.

    Returns:
        [N, H, d].
    """
    lengths = cu_seqlens.diff().tolist()
    masks = keep.split([qkv.shape[2] * n * n for n in lengths]) if keep is not None else [None] * len(lengths)
    outputs = []
    for sequence, mask in zip(widened(qkv).split(lengths), masks, strict=True):
        q, k, v = sequence.permute(1, 2, 0, 3)  # each [H, length, d]
        probabilities = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        if mask is not None:
            probabilities = dropout(probabilities, mask.view_as(probabilities), p)
        outputs.append((probabilities @ v).transpose(0, 1))
    return torch.cat(outputs).to(qkv.dtype)


def first_token_attention(
    queries: Tensor, keys_values: Tensor, cu_seqlens: Tensor, keep: Tensor | None, p: float, scale: float
) -> Tensor:
    """The rows of `attention` for the first token of each sequence.

    Args:
        queries: [S, H, d].
        keys_values: [N, 2, H, d].
        cu_seqlens: [S + 1].
        keep: `attention_dropout_mask`, of all queries, or None without dropout.

    Returns:
        [S, H, d].
    """
    heads, lengths = queries.shape[1], cu_seqlens.diff().tolist()
    masks = keep.split([heads * n * n for n in lengths]) if keep is not None else [None] * len(lengths)
    outputs = []
    for query, sequence, mask in zip(widened(queries), widened(keys_values).split(lengths), masks, strict=True):
        k, v = sequence.permute(1, 2, 0, 3)  # each [H, length, d]
        probabilities = torch.softmax(query[:, None] @ k.transpose(1, 2) * scale, dim=-1)
        if mask is not None:
            probabilities = dropout(probabilities, mask.view(heads, k.shape[1], -1)[:, :1], p)
        outputs.append((probabilities @ v).squeeze(1))
    return torch.stack(outputs).to(queries.dtype)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, p: float, eps: float
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension; x and residual [N, D], weight and bias [D]."""
    total = widened(residual) + dropout(widened(x), keep, p)
    return F.layer_norm(total, x.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) = z Phi(z) with the exact error function; x [N, D], bias [D].

    F.gelu is the same formula, but torch's AVX-512 code for it overflows from 1.7e38 and gives NaN for infinity.
    """
    wide = widened(x)
    z = wide + bias.to(wide.dtype)
    return (z * (0.5 * (1 + torch.erf(z * 0.5**0.5)))).to(x.dtype)


def encoder_layers(
    x: Tensor, layers: Sequence[Sequence[Tensor]], cu_seqlens: Tensor, heads: int, eps: float, first_tokens: bool
) -> Tensor:
    """BERT's layers without dropout (Devlin et al. 2019, section 3).

    Args:
        x: [N, D].
        layers: parameters in the order of `kernels.LayerParameters`; those of products are rounded to x's dtype.
        cu_seqlens: [S + 1].
        first_tokens: whether the result is of each sequence's first token alone.

    Returns:
        [N, D], or [S, D].
    """
    for layer in layers:
        qkv, qkv_bias, mix, mix_bias, norm, norm_bias, *feed_forward = layer
        in_, in_bias, out, out_bias, last_norm, last_norm_bias = feed_forward
        of_heads = _linear(x, qkv, qkv_bias).unflatten(1, (3, heads, -1))
        context = attention(of_heads, cu_seqlens, None, 0.0, of_heads.shape[3] ** -0.5).flatten(1)
        attended = dropout_add_layer_norm(_linear(context, mix, mix_bias), x, norm, norm_bias, None, 0.0, eps)
        inner = bias_gelu(F.linear(attended, in_.to(x.dtype)), in_bias)
        mixed = _linear(inner, out, out_bias)
        x = dropout_add_layer_norm(mixed, attended, last_norm, last_norm_bias, None, 0.0, eps)
    return x.index_select(0, cu_seqlens[:-1]) if first_tokens else x


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def embedding(
    token_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype,
    sparse: bool = False,
) -> Tensor:
    """BERT's embedding block: dropout(LayerNorm(word + token type + position)), [N, D] (Devlin et al. 2019).

    The word table's gradient is a sparse tensor where `sparse` says so.
    """
    words = F.embedding(token_ids, word, sparse=sparse)
    total = words + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    wide = widened(total)
    normed = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return dropout(normed, keep, p).to(dtype)
