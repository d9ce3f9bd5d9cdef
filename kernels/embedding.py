"""BERT's embedding block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls, reference, task_views
from .autograd import first_order_only
from .dispatch import is_compiled
from .dropout import dropout_mask
from .flight_recorder import recorded
from .native import library


def _embeddings(ids: Sequence[Tensor], tables: Sequence[Tensor], rows: slice) -> tuple[list[int], list[int], int]:
    """Addresses and dtype of the three tables and of the ids of their rows, for some of the tokens."""
    addresses = [tensor[rows].data_ptr() for tensor in ids], [tensor.data_ptr() for tensor in tables]
    return *addresses, native_calls.DTYPE_CODES[tables[0].dtype]


def _check_ids(ids: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    for name, of_tokens, table in zip(("token_ids", "token_type_ids", "position_ids"), ids, tables, strict=True):
        checks.ids("embedding", name, of_tokens, table)


@torch.library.custom_op("minbert::embedding", mutates_args=(), device_types="cpu")
@recorded("embedding")
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
) -> tuple[Tensor, Tensor]:
    _check_ids(ids, (words[0], token_types[0], positions[0]))
    y = torch.empty(ids[0].shape[0], weights[0].shape[0], dtype=dtype)
    mean_rstd = torch.empty(y.shape[0], 2, dtype=torch.float32)
    scratch = native_calls.row_scratch(*y.shape)
    library().embedding_forward(
        native_calls.activation(y),
        _embeddings(ids, (words[0], token_types[0], positions[0]), slice(None)),
        weights[0].data_ptr(),
        biases[0].data_ptr(),
        eps,
        native_calls.dropout(p, seed, stream_id),
        y.data_ptr(),
        mean_rstd.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return y, mean_rstd


@_embedding.register_kernel("cuda")
@recorded("embedding")
def _(ids: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, Tensor]:
    from .triton import embedding

    *params, _, eps, p, seed, stream_id, dtype, _ = arguments
    *tables, weight, bias = (views[0] for views in params)
    with torch.cuda.device(weight.device):
        return embedding.forward(ids, tables, weight, bias, eps, p, seed, stream_id, dtype)


@_embedding.register_fake
def _(ids: Sequence[Tensor], words: Sequence[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    tokens, weight, dtype = ids[0].shape[0], others[2][0], others[-2]
    return weight.new_empty(tokens, weight.shape[0], dtype=dtype), weight.new_empty(tokens, 2)


@torch.library.custom_op("minbert::embedding_backward", mutates_args=(), device_types="cpu")
@recorded("embedding_backward")
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
) -> tuple[Tensor, Tensor]:
    """The gradients in float32: of the tables, and of the T weights and biases, [T, 2, D].

    Those of the tables lie one below the other in a matrix [_, D]: T of the words', T of the token types', T of the
    positions'. Task t's of the words has words[t] rows, and token n adds to its row word_rows[n]. On CUDA devices all
    have a row for each of the table's.
    """
    d_tables = weight.new_zeros(sum(_heights(tables, bounds, words)), len(weight))
    d_params = weight.new_zeros(len(bounds) - 1, 2, len(weight))
    tasks, of_all = len(bounds) - 1, d_tables.split(_heights(tables, bounds, words))
    tokens, columns = task_views.longest(bounds), d_y.shape[1]
    d_total = torch.empty(min(tokens, library().EMBEDDING_ROWS), columns, dtype=torch.float32)
    scratch = native_calls.row_scratch(tokens, columns)
    for t, rows in task_views.segments(bounds):
        library().embedding_backward(
            native_calls.activation(d_y[rows]),
            _embeddings(ids, tables, rows),
            word_rows[rows].data_ptr(),
            d_y[rows].data_ptr(),
            weight.data_ptr(),
            mean_rstd[rows].data_ptr(),
            native_calls.dropout(p, seed, stream_id, rows.start),
            d_total.data_ptr(),
            [of_all[table * tasks + t].data_ptr() for table in range(3)],
            d_params[t, 0].data_ptr(),
            d_params[t, 1].data_ptr(),
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
    return d_tables, d_params


def _heights(tables: Sequence[Tensor], bounds: Sequence[int], words: Sequence[int]) -> list[int]:
    """The rows of the gradients that lie one below the other: each task's of the words, token types and positions."""
    return [*words, *(table.shape[0] for table in tables[1:] for _ in bounds[1:])]


@_embedding_backward.register_kernel("cuda")
@recorded("embedding_backward")
def _(d_y: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from .triton import embedding

    *others, _, _ = arguments
    with torch.cuda.device(d_y.device):
        return embedding.backward(d_y, *others)


@_embedding_backward.register_fake
def _(
    d_y: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    weight: Tensor,
    _: Tensor,
    bounds: Sequence[int],
    *others: Any,
) -> tuple[Tensor, Tensor]:
    rows, columns = sum(_heights(tables, bounds, others[-1])), weight.shape[0]
    return weight.new_empty(rows, columns), weight.new_empty(len(bounds) - 1, 2, columns)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ids, *params, ctx.bounds, _, ctx.p, seed, ctx.stream_id, _, ctx.sparse = inputs
    words, token_types, positions, weights, _ = params
    mean_rstd = output[1]
    ctx.mark_non_differentiable(mean_rstd)
    ctx.save_for_backward(*ids, words[0], token_types[0], positions[0], weights[0], mean_rstd, seed)


def _gradients(ctx, d_y: Tensor, *_: Tensor) -> tuple:
    saved, count = ctx.saved_tensors, len(ctx.bounds) - 1
    ids, tables, (weight, mean_rstd, seed) = list(saved[:3]), list(saved[3:6]), saved[6:]
    word_rows, words, distinct = ids[0], [tables[0].shape[0]] * count, list[Tensor]()
    if ctx.sparse:
        distinct, word_rows = _distinct(ids[0], ctx.bounds)
        words = [len(of_task) for of_task in distinct]
    drop = ctx.p, seed, ctx.stream_id
    d_tables, d_params = _embedding_backward(
        d_y.contiguous(), ids, tables, weight, mean_rstd, ctx.bounds, *drop, word_rows, words
    )
    grads = d_tables.to(tables[0].dtype).split(_heights(tables, ctx.bounds, words))
    of_words, of_types, of_positions = (list(grads[table * count : (table + 1) * count]) for table in range(3))
    if ctx.sparse:
        of_words = [_rows_of_table(tables[0], *rows) for rows in zip(distinct, of_words, strict=True)]
    of_params = [list(of_param.unbind()) for of_param in d_params.unbind(1)]
    return [None] * 3, of_words, of_types, of_positions, *of_params, *[None] * 7


def _distinct(token_ids: Tensor, bounds: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Each task's distinct token ids, sorted; and for every token the index of its id among them."""
    found = [
        torch.unique(of_task, return_inverse=True)
        for of_task in token_ids.split([end - start for start, end in pairwise(bounds)])
    ]
    return [ids for ids, _ in found], torch.cat([indices for _, indices in found])


def _rows_of_table(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A sparse tensor like `table` with these values in its sorted `rows`."""
    return torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False, is_coalesced=True)


_embedding.register_autograd(_gradients, setup_context=_save)
first_order_only(_embedding_backward, "embedding")


def embedding(
    token_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: task_views.Parameter,
    token_type: task_views.Parameter,
    position: task_views.Parameter,
    weight: task_views.Parameter,
    bias: task_views.Parameter,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream_id: int = 0,
    dtype: torch.dtype | None = None,
    bounds: Sequence[int] | None = None,
    sparse: bool = False,
) -> Tensor:
    """dropout(LayerNorm(word + token type + position)) for every token (Devlin et al. 2019, section 3).

    Args:
        token_ids, token_type_ids, position_ids: int64 [N], rows of the three tables. On a GPU they are not checked, and
            compiled code gives NaN to a token with an id outside its table.
        word, token_type, position: float [V, D], [types, D], [positions, D], of one dtype; or T views of each.
        weight, bias: float [D], of the layer norm; or T views of each.
        eps: added to the variance.
        dropout_p, seed, stream_id: as for `dropout_mask`; `seed` is needed when dropout_p > 0.
        dtype: the result's, a float one; the tables' when left out.
        bounds: T + 1 numbers: view t gets the gradient of tokens bounds[t] to bounds[t + 1].
        sparse: on the CPU, give `word`, or each of its views, a sparse gradient (COO) with a row for each distinct id,
            as `torch.nn.functional.embedding` does.

    Returns:
        [N, D].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "embedding"
    checks.tensor(op, "token_ids", token_ids, ["N"], [torch.int64])
    params, bounds = task_views.views(
        op, token_ids.shape[0], bounds, word=word, token_type=token_type, position=position, weight=weight, bias=bias
    )
    word, token_type, position, weight, bias = (views[0] for views in params)
    checks.tensor(op, "word", word, ["V", "D"], checks.FLOATS)
    columns = word.shape[1]
    checks.tensor(op, "token_type", token_type, ["types", columns], [word.dtype], like=word)
    checks.tensor(op, "position", position, ["positions", columns], [word.dtype], like=word)
    checks.tensor(op, "weight", weight, [columns], checks.FLOATS, like=word)
    checks.tensor(op, "bias", bias, [columns], checks.FLOATS, like=word)
    all_ids = [token_ids, token_type_ids, position_ids]
    for name, ids in zip(("token_ids", "token_type_ids", "position_ids"), all_ids, strict=True):
        checks.tensor(op, name, ids, token_ids.shape, [torch.int64], like=word)
    seed = checks.dropout(op, dropout_p, seed, stream_id, word.device)
    dtype = checks.float_dtype(op, dtype or word.dtype)
    if sparse and word.device.type == "cuda":
        raise ValueError(f"{op}: sparse gradients are computed on the CPU, got tensors on {word.device}")
    if is_compiled(op, word.device, word.dtype, dtype, columns=columns):
        wide = [[view.float() for view in views] for views in params[3:]]
        return _embedding(all_ids, *params[:3], *wide, bounds, eps, dropout_p, seed, stream_id, dtype, sparse)[0]
    _check_ids(all_ids, (word, token_type, position))
    keep = None
    if seed is not None:
        keep = dropout_mask(token_ids.shape[0], columns, dropout_p, seed, stream_id)

    def of_task(t: int, rows: slice) -> Tensor:
        kept = None if keep is None else keep[rows]
        ids, views = [ids[rows] for ids in all_ids], [views[t] for views in params]
        return reference.embedding(*ids, *views, kept, dropout_p, eps, dtype, sparse)  # type: ignore[call-arg, arg-type]

    return task_views.by_segment(bounds, of_task)
