"""Every op in plain PyTorch. This file is the specification: a kernel is right when it agrees with it.

Half-precision inputs are widened to float32 inside an op and rounded once on the way out; float64 stays float64.
Shapes: N tokens, D hidden size, H heads, d = D / H, S sequences, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# Random numbers --------------------------------------------------------------------------------------------------


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four random 32-bit words per counter.

    Args:
        counter: four broadcastable int64 tensors of 32-bit words.
        seed: int64 scalar; its low word is the first key word, its high word the second.

    Returns:
        four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]  # wraps at 2**64, as it should
        c0, c1, c2, c3 = (
            (product1 >> 32) & WORD ^ c1 ^ key0,
            product1 & WORD,
            (product0 >> 32) & WORD ^ c3 ^ key1,
            product0 & WORD,
        )
        key0, key1 = (key0 + PHILOX_KEY_STEPS[0]) & WORD, (key1 + PHILOX_KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def drop_threshold(p: float) -> int:
    """A word below this number drops its element: floor(p * 2**32)."""
    return int(p * 2**32)


def dropout_mask(rows: int, columns: int, p: float, seed: Tensor, site: int) -> Tensor:
    """Which elements of a [rows, columns] activation dropout keeps, as bool.

    Element (row, column) reads word `column % 4` of counter (column // 4, row, 0, site).
    """
    group = torch.arange(-(-columns // 4), device=seed.device)[None, :]
    row = torch.arange(rows, device=seed.device)[:, None]
    words = philox((group, row, torch.zeros_like(row), torch.full_like(row, site)), seed)
    return (torch.stack(words, dim=-1).reshape(rows, -1)[:, :columns] >= drop_threshold(p)).contiguous()


def attention_dropout_mask(cu_seqlens: Tensor, heads: int, p: float, seed: Tensor, site: int) -> Tensor:
    """Which attention probabilities dropout keeps: bool, one [heads, length, length] block per sequence, end to end.

    Probability (head, query, key) reads word `head % 4` of counter (key's position in its sequence,
    query's row in the packed stream, head // 4, site).
    """
    blocks = []
    bounds = cu_seqlens.tolist()
    group = torch.arange(-(-heads // 4), device=seed.device)[:, None, None]
    for start, end in pairwise(bounds):
        query = torch.arange(start, end, device=seed.device)[None, :, None]
        key = torch.arange(end - start, device=seed.device)[None, None, :]
        words = philox((key, query, group, torch.full_like(group, site)), seed)
        blocks.append((torch.stack(words, dim=1).flatten(0, 1)[:heads] >= drop_threshold(p)).flatten())
    return torch.cat(blocks)


def dropout(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """Zero what `keep` does not keep and scale the rest by 1 / (1 - p); `keep=None` changes nothing."""
    return x if keep is None else x * keep / (1 - p)


# The encoder's ops -----------------------------------------------------------------------------------------------


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
    for sequence, mask in zip(_wide(qkv).split(lengths), masks, strict=True):
        q, k, v = sequence.permute(1, 2, 0, 3)  # each [H, length, d]
        probabilities = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        if mask is not None:
            probabilities = dropout(probabilities, mask.view_as(probabilities), p)
        outputs.append((probabilities @ v).transpose(0, 1))
    return torch.cat(outputs).to(qkv.dtype)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, p: float, eps: float
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension; x and residual [N, D], weight and bias [D]."""
    total = _wide(residual) + dropout(_wide(x), keep, p)
    return F.layer_norm(total, x.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) with the exact error function; x [N, D], bias [D]."""
    wide = _wide(x)
    return F.gelu(wide + bias.to(wide.dtype)).to(x.dtype)


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
) -> Tensor:
    """BERT's embedding block: dropout(LayerNorm(word + token type + position)), [N, D] (Devlin et al. 2019)."""
    total = F.embedding(token_ids, word) + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    wide = _wide(total)
    normed = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return dropout(normed, keep, p).to(total.dtype)


# Gradient surgery and the optimizer ------------------------------------------------------------------------------


def gram(grads: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Gram matrix of the task gradients, float64 [T, T]: entry (i, j) is the sum over all elements of g_i g_j.

    A missing tensor (None) counts as zeros.
    """
    tasks = len(grads)
    total = torch.zeros(tasks, tasks, dtype=torch.float64)
    for row in zip(*grads, strict=True):
        present = [t for t in range(tasks) if row[t] is not None]
        if present:
            flat = torch.stack([row[t].reshape(-1).double() for t in present])  # type: ignore[union-attr]
            total = total.to(flat.device)
            total[torch.tensor(present)[:, None], torch.tensor(present)] += flat @ flat.T
    return total


def combine(grads: Sequence[Sequence[Tensor | None]], weights: Tensor) -> list[Tensor | None]:
    """The weighted sum of the task gradients, tensor by tensor; None where no task has the tensor."""
    combined: list[Tensor | None] = []
    for row in zip(*grads, strict=True):
        terms = [w.to(_wide(g).dtype) * _wide(g) for w, g in zip(weights, row, strict=True) if g is not None]
        first = next((g for g in row if g is not None), None)
        combined.append(sum(terms[1:], terms[0]).to(first.dtype) if first is not None else None)
    return combined


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place (Loshchilov and Hutter 2019, algorithm 2), `step` counted from 1.

    The bias corrections are folded into two scalars (Kingma and Ba 2015, section 2, last paragraph); eps is
    scaled with them, so that the result is that of the written-out form.
    """
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5
    step_size = lr * correction / (1 - beta1**step)
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        grad = grad.to(exp_avg.dtype)
        param.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        param.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps * correction), value=-step_size)
