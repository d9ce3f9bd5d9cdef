"""The results of every custom op by the reference, from the op's own arguments: backwards and native layouts included.

Each function takes what the op of its name takes, and lists what that op computes, in its order. Called with float64
tensors it computes in float64. What an op keeps for its backward is left out. They are to be called under
`use_backend("reference")`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, task_views
from .attention import attention
from .dropout import attention_dropout_mask, dropout, dropout_mask, mask_like
from .embedding import embedding
from .encoder_layers import layers_of
from .first_token_attention import first_token_attention
from .gelu import bias_gelu
from .layer_norm import dropout_add_layer_norm
from .linear import linear
from .reference.precision import widened
from .smart import smart_ascend, smart_init

Results = list[Tensor]


def _gradients(op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Results:
    """The gradients of `inputs`; zeros for one that the result does not depend on."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        found = torch.autograd.grad(op(*leaves), leaves, grad, allow_unused=True)
    return [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True)]


def _dropout_mask(rows: int, columns: int, threshold: int, seed: Tensor, stream_id: int) -> Results:
    return [dropout_mask(rows, columns, threshold / 2**32, seed, stream_id)]


def _attention_dropout_mask(cu_seqlens: Tensor, heads: int, threshold: int, seed: Tensor, stream_id: int) -> Results:
    return [attention_dropout_mask(cu_seqlens, heads, threshold / 2**32, seed, stream_id)]


def _dropout(x: Tensor, p: float, seed: Tensor, stream_id: int) -> Results:
    return [dropout(x, p=p, seed=seed, stream_id=stream_id)]


def _attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    p: float,
    seed: Tensor | None,
    stream_id: int,
    scale: float,
    *_: Tensor | None,
) -> Results:
    options: dict[str, Any] = {"dropout_p": p, "seed": seed, "stream_id": stream_id, "softmax_scale": scale}
    return [attention(qkv, cu_seqlens, max_seqlen, **options)]


def _attention_backward(grad_out: Tensor, qkv: Tensor, *problem: Any) -> Results:
    return _gradients(lambda qkv: _attention(qkv, *problem)[0], [qkv], grad_out)


def _first_token_attention(
    queries: Tensor,
    keys_values: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    p: float,
    seed: Tensor | None,
    stream_id: int,
    scale: float,
) -> Results:
    options: dict[str, Any] = {"dropout_p": p, "seed": seed, "stream_id": stream_id, "softmax_scale": scale}
    return [first_token_attention(queries, keys_values, cu_seqlens, max_seqlen, **options)]


def _first_token_attention_backward(grad_out: Tensor, queries: Tensor, keys_values: Tensor, *problem: Any) -> Results:
    return _gradients(lambda *inputs: _first_token_attention(*inputs, *problem)[0], [queries, keys_values], grad_out)


def _bias_gelu(x: Tensor, biases: Sequence[Tensor], bounds: Sequence[int]) -> Results:
    return [bias_gelu(x, biases[0])]


def _bias_gelu_backward(d_y: Tensor, x: Tensor, bias: Tensor, bounds: Sequence[int]) -> Results:
    views = [bias] * (len(bounds) - 1)
    d_x, *d_biases = _gradients(lambda x, *views: bias_gelu(x, views, bounds=bounds), [x, *views], d_y)
    return [d_x, torch.stack(d_biases)]


def _dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[int],
    eps: float,
    p: float,
    seed: Tensor | None,
    stream_id: int,
    dropout_rows: Tensor | None,
) -> Results:
    drop: dict[str, Any] = {"dropout_p": p, "seed": seed, "stream_id": stream_id, "dropout_rows": dropout_rows}
    return [dropout_add_layer_norm(x, residual, weights[0], biases[0], eps=eps, **drop)]


def _through_layer_norm(
    d_y: Tensor, x: Tensor, weight: Tensor, mean_rstd: Tensor, bounds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The gradients of a layer norm's input and of its T weights and biases, [T, 2, D] (Ba et al. 2016).

    The mean and the reciprocal standard deviation of each row are those that the forward kept.
    """
    mean, rstd = mean_rstd.to(x.dtype).split(1, dim=1)
    normed, d_normed = (x - mean) * rstd, d_y * weight.to(x.dtype)
    projected = normed * (d_normed * normed).mean(1, keepdim=True)
    d_params = weight.new_zeros(len(bounds) - 1, 2, len(weight))
    for t, rows in task_views.segments(bounds):
        d_params[t] = torch.stack([(d_y[rows] * normed[rows]).sum(0), d_y[rows].sum(0)])
    return rstd * (d_normed - d_normed.mean(1, keepdim=True) - projected), d_params


def _dropout_add_layer_norm_backward(
    d_y: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean_rstd: Tensor,
    bounds: Sequence[int],
    p: float,
    seed: Tensor | None,
    stream_id: int,
    dropout_rows: Tensor | None,
) -> Results:
    keep = mask_like(x, p, seed, stream_id, dropout_rows)
    total = widened(residual) + reference.dropout(widened(x), keep, p)
    d_total, d_params = _through_layer_norm(widened(d_y), total, weight, mean_rstd, bounds)
    d_x = reference.dropout(d_total, keep, p) if reference.drop_threshold(p) else d_total.new_empty(0)
    return [d_x.to(x.dtype), d_total.to(x.dtype), d_params]


def _embedding(
    ids: Sequence[Tensor],
    words: Sequence[Tensor],
    token_types: Sequence[Tensor],
    positions: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bounds: Sequence[int],
    eps: float,
    p: float,
    seed: Tensor | None,
    stream_id: int,
    dtype: torch.dtype,
    sparse: bool,
) -> Results:
    params = (views[0] for views in (words, token_types, positions, weights, biases))
    drop: dict[str, Any] = {"dropout_p": p, "seed": seed, "stream_id": stream_id}
    return [embedding(*ids, *params, eps=eps, dtype=dtype, **drop)]


def _embedding_backward(
    d_y: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor,
    mean_rstd: Tensor,
    bounds: Sequence[int],
    p: float,
    seed: Tensor | None,
    stream_id: int,
    word_rows: Tensor,
    words: Sequence[int],
) -> Results:
    total = torch.stack([widened(table[rows]) for table, rows in zip(tables, ids, strict=True)]).sum(0)
    d_normed = reference.dropout(widened(d_y), mask_like(d_y, p, seed, stream_id), p)
    d_total, d_params = _through_layer_norm(d_normed, total, weight, mean_rstd, bounds)
    tasks = len(bounds) - 1
    heights = [words, *([len(table)] * tasks for table in tables[1:])]
    parts = []
    for of_tasks, rows_of in zip(heights, (word_rows, *ids[1:]), strict=True):
        for t, height in enumerate(of_tasks):
            of_task = slice(bounds[t], bounds[t + 1])
            d_table = weight.new_zeros(height, len(weight))
            parts.append(d_table.index_add(0, rows_of[of_task], d_total[of_task]))
    return [torch.cat(parts), d_params]


def _encoder_layers(
    x: Tensor,
    parameters: Sequence[Tensor],
    cu_seqlens: Tensor,
    layers: int,
    heads: int,
    inner: int,
    eps: float,
    max_seqlen: int,
    first_tokens: bool,
) -> Results:
    """With the parameters in place of the packed ones."""
    return [reference.encoder_layers(x, layers_of(parameters), cu_seqlens, heads, eps, first_tokens)]


def _linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], bounds: Sequence[int]) -> Results:
    return [linear(x, weights[0], biases[0] if biases else None)]


def _linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bounds: Sequence[int],
    for_x: bool,
    for_weights: bool,
    bias: torch.dtype | None,
) -> Results:
    d_x = grad @ weight.to(grad.dtype) if for_x else grad.new_empty(0)
    parts = [slice(start, end) for start, end in pairwise(bounds)]
    d_weights = [F.linear(grad[rows].t(), x[rows].t()).to(weight.dtype) for rows in parts] if for_weights else []
    return [d_x, *d_weights, *([grad[rows].sum(0, dtype=bias) for rows in parts] if bias else [])]


def _task_gradients(
    grads: Sequence[Tensor | None], tasks: int, rows: Sequence[Tensor | None] = (), tables: Sequence[int] = ()
) -> list[list[Tensor | None]]:
    """One list of dense tensors for each task."""
    count = len(grads) // tasks
    dense = [
        grad
        if grad is None or of_rows is None
        else grad.new_zeros(tables[i % count], grad.shape[1]).index_copy(0, of_rows, grad)
        for i, (grad, of_rows) in enumerate(zip(grads, rows or [None] * len(grads), strict=True))
    ]
    return [dense[t * count : (t + 1) * count] for t in range(tasks)]


def _parts(first_columns: Sequence[int] | None) -> list[int] | None:
    """For each column of the task gradients the number of its part of the model."""
    if first_columns is None:
        return None
    return [part for part, (first, end) in enumerate(pairwise(first_columns)) for _ in range(first, end)]


def _gram(
    grads: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    tables: Sequence[int],
    tasks: int,
    first_columns: Sequence[int] | None = None,
) -> Results:
    parts, count = _parts(first_columns), len(first_columns or (0, 0)) - 1
    return [reference.gram(_task_gradients(grads, tasks, rows, tables), parts, count)]


def _combine(
    grads: Sequence[Tensor | None],
    weights: Tensor,
    out: Sequence[Tensor],
    first_columns: Sequence[int] | None = None,
) -> Results:
    of_tasks = _task_gradients(grads, weights.shape[-1])
    return reference.combine(of_tasks, weights, _parts(first_columns))  # type: ignore[return-value]


def _combine_adamw(
    grads: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    tables: Sequence[int],
    weights: Tensor,
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ema: Sequence[Tensor],
    copies: Sequence[Tensor],
    low_bits: Sequence[Tensor],
    skip_unless: Tensor | None,
    scalars: Sequence[float],
    first_columns: Sequence[int] | None = None,
) -> Results:
    """Of parameters that are joined where they were split; the gradients' rows are those of `_task_gradients`."""
    shrink, beta1, beta2, eps, step_size, ema_decay = scalars
    correction = (1 - beta2) ** 0.5  # the scalars are those of a first step with this learning rate and eps
    lr = step_size * (1 - beta1) / correction
    state = [[tensor.clone() for tensor in tensors] for tensors in (params, exp_avgs, exp_avg_sqs, ema)]
    reference.combine_adamw_(
        state[0],
        _task_gradients(grads, weights.shape[-1], rows, tables),
        weights,
        state[1],
        state[2],
        step=1,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps / correction,
        weight_decay=(1 - shrink) / lr if lr else 0.0,
        ema=state[3] or None,
        ema_decay=ema_decay,
        skip_unless=skip_unless,
        parts=_parts(first_columns),
    )
    made = [param.to(copy.dtype) for param, copy in zip(state[0], copies, strict=bool(copies)) if copy.numel()]
    return [tensor for tensors in (*state, made) for tensor in tensors]


def _surgery_weights(
    gram: Tensor, orders: Tensor | None, weights: Tensor | None, own_square: Tensor | None, max_norm: float, mean: bool
) -> Results:
    return list(reference.surgery_weights(gram, orders, weights, own_square, max_norm, mean))


def _task_weights(
    gram: Tensor,
    rule: str,
    options: Sequence[float],
    losses: Tensor | None,
    noise: Tensor | None,
    orders: Tensor | None,
    state: Tensor | None,
) -> Results:
    changed = None if state is None else state.clone()
    weights = reference.task_weights(gram, rule, options, losses, noise, orders, changed)
    return [weights] if changed is None else [weights, changed]


def _smart_init(x: Tensor, sigma: float, seed: Tensor, stream_id: int, scale: Tensor | None = None) -> Results:
    return [smart_init(x, sigma=sigma, seed=seed, stream_id=stream_id, scale=None if scale is None else scale.float())]


def _smart_ascend(
    perturbed: Tensor,
    x: Tensor,
    grad: Tensor,
    cu_seqlens: Tensor,
    eta: float,
    epsilon: float,
    infinity_norm: bool,
    per_sequence: bool,
    onto_ball: bool,
    scale: Tensor | None = None,
) -> Results:
    ways: dict[str, Any] = {
        "norm": "inf" if infinity_norm else "2",
        "per": "sequence" if per_sequence else "token",
        "projection": "ball" if onto_ball else "unit",
        "scale": None if scale is None else scale.float(),
    }
    return [smart_ascend(perturbed, x, grad, cu_seqlens, eta=eta, epsilon=epsilon, **ways)]


REFERENCES: dict[str, Callable[..., Results]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_dropout_mask": _attention_dropout_mask,
    "bias_gelu": _bias_gelu,
    "bias_gelu_backward": _bias_gelu_backward,
    "combine_": _combine,
    "combine_adamw_": _combine_adamw,
    "dropout": _dropout,
    "dropout_add_layer_norm": _dropout_add_layer_norm,
    "dropout_add_layer_norm_backward": _dropout_add_layer_norm_backward,
    "dropout_mask": _dropout_mask,
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "encoder_layers": _encoder_layers,
    "first_token_attention": _first_token_attention,
    "first_token_attention_backward": _first_token_attention_backward,
    "gram": _gram,
    "linear": _linear,
    "linear_backward": _linear_backward,
    "smart_ascend": _smart_ascend,
    "smart_init": _smart_init,
    "surgery_weights": _surgery_weights,
    "task_weights": _task_weights,
}
