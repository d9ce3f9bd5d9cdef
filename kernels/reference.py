"""Every op in plain PyTorch. This file is the specification: a kernel is right when it agrees with it.

Half-precision inputs are widened to float32 inside an op and rounded once on the way out; float64 stays float64.
Shapes: N tokens, D hidden size, H heads, d = D / H, S sequences, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .split_float32 import join_float32, split_float32

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


def numbered(rows: Tensor, seed: Tensor) -> Tensor:
    """The numbers of an op's rows in the stream, modulo 2**32; seed holds the seed and the first row's number."""
    return (rows + seed[1]) & WORD


def drop_threshold(p: float) -> int:
    """A word below this number drops its element: floor(p * 2**32)."""
    return int(p * 2**32)


def dropout_mask(rows: int | Tensor, columns: int, p: float, seed: Tensor, stream_id: int) -> Tensor:
    """Which elements of a [rows, columns] activation dropout keeps, as bool; or of those rows of one, int32 [n].

    Element (row, column) reads word `column % 4` of counter (column // 4, row, 0, stream_id), rows `numbered`.
    """
    group = torch.arange(-(-columns // 4), device=seed.device)[None, :]
    of_rows = torch.arange(rows, device=seed.device) if isinstance(rows, int) else rows.long()
    row = numbered(of_rows[:, None], seed)
    words = philox((group, row, torch.zeros_like(row), torch.full_like(row, stream_id)), seed[0])
    return (torch.stack(words, dim=-1).reshape(len(of_rows), -1)[:, :columns] >= drop_threshold(p)).contiguous()


def attention_dropout_mask(cu_seqlens: Tensor, heads: int, p: float, seed: Tensor, stream_id: int) -> Tensor:
    """Which attention probabilities dropout keeps: bool, one [heads, length, length] block per sequence, end to end.

    Probability (head, query, key) reads word `head % 4` of counter (key's position in its sequence,
    query's row in the packed stream, head // 4, stream_id), rows `numbered`.
    """
    blocks = []
    bounds = cu_seqlens.tolist()
    group = torch.arange(-(-heads // 4), device=seed.device)[:, None, None]
    for start, end in pairwise(bounds):
        query = numbered(torch.arange(start, end, device=seed.device)[None, :, None], seed)
        key = torch.arange(end - start, device=seed.device)[None, None, :]
        words = philox((key, query, group, torch.full_like(group, stream_id)), seed[0])
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
    for query, sequence, mask in zip(_wide(queries), _wide(keys_values).split(lengths), masks, strict=True):
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
    total = _wide(residual) + dropout(_wide(x), keep, p)
    return F.layer_norm(total, x.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) = z Phi(z) with the exact error function; x [N, D], bias [D].

    F.gelu is the same formula, but torch's AVX-512 code for it overflows from 1.7e38 and gives NaN for infinity.
    """
    wide = _wide(x)
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
    wide = _wide(total)
    normed = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return dropout(normed, keep, p).to(dtype)


# Gradient surgery and the optimizer ------------------------------------------------------------------------------


def gram(grads: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Gram matrix of the task gradients, float64 [T, T]: entry (i, j) is the sum over all elements of g_i g_j.

    A missing tensor (None) counts as zeros. Sparse gradients are what they are as dense ones.
    """
    tasks = len(grads)
    total = torch.zeros(tasks, tasks, dtype=torch.float64)
    for row in zip(*grads, strict=True):
        present = [t for t in range(tasks) if row[t] is not None]
        if present:
            flat = torch.stack([row[t].to_dense().reshape(-1).double() for t in present])  # type: ignore[union-attr]
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
    ema: Sequence[Tensor] | None = None,
    ema_decay: float = 0.0,
    copies: Sequence[Tensor | None] | None = None,
    low_bits: Sequence[Tensor | None] | None = None,
    skip_unless: Tensor | None = None,
) -> None:
    """One AdamW step in place (Loshchilov and Hutter 2019, algorithm 2), `step` counted from 1.

    The bias corrections are folded into two scalars (Kingma and Ba 2015, section 2, last paragraph); eps is
    scaled with them, so that the result is that of the written-out form. The moving averages of the parameters, where
    they are kept, become ema_decay ema + (1 - ema_decay) param; copies are the parameters rounded to bfloat16. A split
    parameter is joined before and split after. Nothing changes where `skip_unless` is 0.
    """
    if skip_unless is not None and not skip_unless:
        return
    pairs = list(zip(params, low_bits or [None] * len(params), strict=True))
    params = [param if low is None else join_float32(param, low) for param, low in pairs]
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5
    step_size = lr * correction / (1 - beta1**step)
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        grad = grad.to(exp_avg.dtype)
        param.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        param.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(eps * correction), value=-step_size)
    for param, average in zip(params, ema or (), strict=ema is not None):
        average.lerp_(param, 1 - ema_decay)
    for param, copy in zip(params, copies or (), strict=copies is not None):
        if copy is not None:
            copy.copy_(param)
    for (param, low), joined in zip(pairs, params, strict=True):
        if low is not None:
            for part, value in zip((param, low), split_float32(joined), strict=True):
                part.copy_(value)


def clip_weights(gram: Tensor, weights: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Weights whose sum of gradients has an L2 norm of at most `max_norm`, and the norm before: |sum w g|^2 = w' G w.

    Rounding may leave the square of a sum that cancels a little below 0: it counts as 0. Where the norm is NaN or Inf,
    it is returned and the weights stay as they are.
    """
    norm = (weights @ gram @ weights).clamp(min=0).sqrt()
    clips = (norm > max_norm) & norm.isfinite()
    return torch.where(clips, weights * (max_norm / norm), weights), norm


def surgery_weights(
    gram: Tensor, orders: Tensor | None, weights: Tensor | None, own_square: Tensor | None, max_norm: float, mean: bool
) -> tuple[Tensor, Tensor]:
    """The weights of the task gradients, and [norm, clip scale, whether the norm is finite, projected share].

    PCGrad's where orders [T, T] are given (Yu et al. 2020, algorithm 1), projecting coefficients of gradients instead
    of gradients; else `weights`, else 1 each, or 1 / T for the mean. Every operation is on two float64 numbers, in the
    order written here: other implementations give the same bits.
    """
    products, tasks = gram.tolist(), len(gram)
    plain = [1 / tasks if mean else 1.0] * tasks
    if orders is not None:
        total = [0.0] * tasks
        finite = bool(gram.isfinite().all())
        for i, order in enumerate(orders.tolist()):
            coefficients = [float(j == i) for j in range(tasks)]  # of task i's gradient, in terms of the original ones
            for j in order if finite else ():
                product = _dot(coefficients, products[j])
                if j != i and product < 0 < products[j][j]:
                    coefficients[j] -= product / products[j][j]
            total = [a + b for a, b in zip(total, coefficients, strict=True)]
        result = [weight / tasks for weight in total] if mean else total
    else:
        result = plain if weights is None else weights.tolist()

    def square(v: list[float]) -> float:  # v' G v
        return _dot([1.0] * tasks, [a * _dot(row, v) for a, row in zip(v, products, strict=True)])

    def at_least_0(x: float) -> float:  # what cancels counts as 0; -Inf stays: its root is NaN
        return 0.0 if -math.inf < x < 0 else x

    def root(x: float) -> float:
        return math.nan if x == -math.inf else math.sqrt(at_least_0(x))

    own = 0.0 if own_square is None else own_square.item()
    norm = root(at_least_0(square(result)) + own)
    scale = max_norm / norm if 0 < max_norm < norm < math.inf else 1.0
    whole, changed = square(plain), square([a - b for a, b in zip(result, plain, strict=True)])
    share = root(changed / whole) if whole > 0 else math.nan
    stats = gram.new_tensor([norm, scale, float(math.isfinite(norm)), share])
    return gram.new_tensor([weight * scale for weight in result]), stats


def _dot(a: list[float], b: list[float]) -> float:
    total = 0.0  # not sum(), which compensates from Python 3.12 on
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def combine_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    ema: Sequence[Tensor] | None = None,
    copies: Sequence[Tensor | None] | None = None,
    low_bits: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> None:
    """`adamw_` with the gradients that `combine` gives, not rounded to a half precision in between.

    Parameters whose gradient is missing in every task stay as they are.
    """
    wide = [[None if grad is None else _wide(grad.to_dense()) for grad in row] for row in grads]
    summed = {k: grad for k, grad in enumerate(combine(wide, weights)) if grad is not None}
    state = ([tensors[k] for k in summed] for tensors in (exp_avgs, exp_avg_sqs))
    more = {"ema": ema, "copies": copies, "low_bits": low_bits}
    options |= {name: None if tensors is None else [tensors[k] for k in summed] for name, tensors in more.items()}
    adamw_([params[k] for k in summed], list(summed.values()), *state, **options)


# SMART -----------------------------------------------------------------------------------------------------------


def normal(rows: int, columns: int, seed: Tensor, stream_id: int, dtype: torch.dtype) -> Tensor:
    """Standard normals [rows, columns] by Box and Muller (1958), float32 or float64.

    Element (row, column) comes from counter (column // 4, row, 1, stream_id), rows `numbered`. Of its words (w0, w1,
    w2, w3), the pair (w0, w1) gives columns 4 k and 4 k + 1, the pair (w2, w3) columns 4 k + 2 and 4 k + 3: with the
    upper 24 bits of a pair (a, b), u = (a + 1) / 2^24 in (0, 1] and v = b / 2^24 in [0, 1), all exact in float32, they
    are sqrt(-2 ln u) cos(2 pi v) and sqrt(-2 ln u) sin(2 pi v).
    """
    group = torch.arange(-(-columns // 4), device=seed.device)[None, :]
    row = numbered(torch.arange(rows, device=seed.device)[:, None], seed)
    words = (
        torch.stack(philox((group, row, torch.ones_like(row), torch.full_like(row, stream_id)), seed[0]), dim=-1) >> 8
    )
    u = (words[..., 0::2] + 1).to(dtype) / 2**24
    v = words[..., 1::2].to(dtype) / 2**24
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).reshape(rows, -1)[:, :columns]


def _in_units(length: float, scale: Tensor | None, like: Tensor) -> Tensor:
    """A length in units of `scale`, or of 1, as a scalar."""
    return length * (like.new_ones(()) if scale is None else scale.to(like.dtype))


def smart_init(x: Tensor, sigma: float, seed: Tensor, stream_id: int, scale: Tensor | None = None) -> Tensor:
    """x + sigma `normal`, the start of SMART's ascent; x [N, D] (Jiang et al. 2019, algorithm 1).

    sigma is in units of `scale`, a scalar tensor, where there is one.
    """
    if sigma == 0:
        return x.clone()
    wide = _wide(x)
    noise = normal(x.shape[0], x.shape[1], seed, stream_id, wide.dtype)
    return (wide + _in_units(sigma, scale, wide) * noise).to(x.dtype)


def smart_ascend(
    perturbed: Tensor,
    x: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    eta: float,
    epsilon: float,
    norm: str,
    per: str,
    projection: str,
    scale: Tensor | None = None,
) -> Tensor:
    """One projected step of SMART's gradient ascent (Jiang et al. 2019, algorithm 1); [N, D] all.

    eta and epsilon are in units of `scale`, a scalar tensor, where there is one. A group is a token or a sequence.
    Within each group:

    1. point = perturbed + eta grad / |grad|, or perturbed where eta is 0 or |grad| is 0 or not finite.
    2. "ball": the nearest result to `point` with |result - x| <= epsilon. In the infinity norm every element is clamped
       to [x - epsilon, x + epsilon]; in the L2 norm the offset from x is rescaled if it is longer than epsilon. What
       lies in the ball stays as it is, to the bit.
       "unit": the offset of `point` from x is rescaled to the norm epsilon; it stays where its norm is 0 or not finite.

    L2 norms are summed in float64, so that no square overflows or vanishes.
    """
    start, centre, gradient = _wide(perturbed), _wide(x), _wide(grad)
    step, radius = _in_units(eta, scale, start), _in_units(epsilon, scale, start)
    gradient_norm = _group_norms(gradient, cu_seqlens, norm, per)
    moves = (gradient_norm > 0) & gradient_norm.isfinite() & (step != 0)
    point = torch.where(moves, start + gradient / gradient_norm * step, start)
    if projection == "ball" and norm == "inf":
        low, high = centre - radius, centre + radius
        result = torch.where(point < low, low, point)
        result = torch.where(result > high, high, result)
    else:
        distance = _group_norms(point - centre, cu_seqlens, norm, per)
        rescales = distance > radius if projection == "ball" else (distance > 0) & distance.isfinite()
        result = torch.where(rescales, centre + (point - centre) / distance * radius, point)
    return result.to(perturbed.dtype)


def _group_norms(x: Tensor, cu_seqlens: Tensor, norm: str, per: str) -> Tensor:
    """For every token [N, 1] the norm of its group's elements."""
    totals = x.abs().amax(1) if norm == "inf" else x.double().square().sum(1)
    if per == "sequence":
        lengths = cu_seqlens.diff().long()
        groups = totals.split(lengths.tolist())
        totals = torch.stack([group.amax() if norm == "inf" else group.sum() for group in groups])
        totals = totals.repeat_interleave(lengths)
    return (totals if norm == "inf" else totals.sqrt().to(x.dtype))[:, None]
