"""BERT's embedding block."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference, rowwise
from .autograd import first_order_only
from .dispatch import runs_native
from .native import library
from .random import dropout_mask


def _embeddings(ids: list[Tensor], tables: list[Tensor]) -> tuple[list[int], list[int], int]:
    """Addresses and dtype of the three tables and of the ids of their rows."""
    addresses = [tensor.data_ptr() for tensor in ids], [tensor.data_ptr() for tensor in tables]
    return *addresses, rowwise.dtype_code(tables[0])


@torch.library.custom_op("minbert::embedding", mutates_args=(), device_types="cpu")
def _embedding(
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(ids[0].shape[0], weight.shape[0], dtype=dtype)
    moments = torch.empty(y.shape[0], 2, dtype=torch.float32)  # mean and 1 / standard deviation
    scratch = rowwise.scratch(y)
    library().embedding_forward(
        rowwise.activation(y),
        _embeddings(ids, tables),
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        rowwise.dropout(p, seed, site),
        y.data_ptr(),
        moments.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return y, moments


@_embedding.register_fake
def _(
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tokens = ids[0].shape[0]
    return weight.new_empty(tokens, weight.shape[0], dtype=dtype), weight.new_empty(tokens, 2)


@torch.library.custom_op("minbert::embedding_backward", mutates_args=(), device_types="cpu")
def _embedding_backward(
    d_y: Tensor,
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    moments: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the three tables, weight and bias, in float32."""
    d_tables = [torch.zeros(table.shape, dtype=torch.float32) for table in tables]
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    d_total = torch.empty(min(d_y.shape[0], library().EMBEDDING_ROWS), d_y.shape[1], dtype=torch.float32)
    scratch = rowwise.scratch(d_y)
    library().embedding_backward(
        rowwise.activation(d_y),
        _embeddings(ids, tables),
        d_y.data_ptr(),
        weight.data_ptr(),
        moments.data_ptr(),
        rowwise.dropout(p, seed, site),
        d_total.data_ptr(),
        [table.data_ptr() for table in d_tables],
        d_weight.data_ptr(),
        d_bias.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    word, token_type, position = d_tables
    return word, token_type, position, d_weight, d_bias


@_embedding_backward.register_fake
def _(
    d_y: Tensor,
    ids: list[Tensor],
    tables: list[Tensor],
    weight: Tensor,
    moments: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    word, token_type, position = (torch.empty_like(table, dtype=torch.float32) for table in tables)
    return word, token_type, position, torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ids, tables, weight, _, _, ctx.p, seed, ctx.site, _ = inputs
    moments = output[1]
    ctx.mark_non_differentiable(moments)
    ctx.save_for_backward(*ids, *tables, weight, moments, seed)


def _gradients(ctx, d_y: Tensor, *_: Tensor) -> tuple:
    saved = ctx.saved_tensors
    ids, tables, (weight, moments, seed) = list(saved[:3]), list(saved[3:6]), saved[6:]
    *d_tables, d_weight, d_bias = _embedding_backward(
        d_y.contiguous(), ids, tables, weight, moments, ctx.p, seed, ctx.site
    )
    d_tables = [gradient.to(table.dtype) for gradient, table in zip(d_tables, tables, strict=True)]
    return [None] * 3, d_tables, d_weight, d_bias, None, None, None, None, None


_embedding.register_autograd(_gradients, setup_context=_save)
first_order_only(_embedding_backward, "embedding")


def embedding(
    token_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(LayerNorm(word + token type + position)) for every token (Devlin et al. 2019, section 3).

    Args:
        token_ids, token_type_ids, position_ids: int64 [N], rows of the three tables.
        word, token_type, position: float [V, D], [types, D], [positions, D], of one dtype.
        weight, bias: float [D], of the layer norm.
        eps: added to the variance.
        dropout_p, seed, site: as for `dropout_mask`; `seed` is needed when dropout_p > 0.
        dtype: the result's, a float one; the tables' when left out.

    Returns:
        [N, D].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "embedding"
    checks.tensor(op, "word", word, ["V", "D"], checks.FLOATS)
    columns = word.shape[1]
    checks.tensor(op, "token_type", token_type, ["types", columns], [word.dtype], like=word)
    checks.tensor(op, "position", position, ["positions", columns], [word.dtype], like=word)
    checks.tensor(op, "weight", weight, [columns], checks.FLOATS, like=word)
    checks.tensor(op, "bias", bias, [columns], checks.FLOATS, like=word)
    checks.tensor(op, "token_ids", token_ids, ["N"], [torch.int64], like=word)
    checks.tensor(op, "token_type_ids", token_type_ids, token_ids.shape, [torch.int64], like=word)
    checks.tensor(op, "position_ids", position_ids, token_ids.shape, [torch.int64], like=word)
    checks.ids(op, "token_ids", token_ids, word)
    checks.ids(op, "token_type_ids", token_type_ids, token_type)
    checks.ids(op, "position_ids", position_ids, position)
    checks.dropout(op, dropout_p, seed, site, word.device)
    dtype = checks.float_dtype(op, dtype or word.dtype)
    ids, tables = [token_ids, token_type_ids, position_ids], [word, token_type, position]
    if runs_native(op, word.device) and rowwise.is_native(word.dtype, dtype):
        return _embedding(ids, tables, weight.float(), bias.float(), eps, dropout_p, seed, site, dtype)[0]
    keep = None
    if dropout_p > 0 and seed is not None:
        keep = dropout_mask(token_ids.shape[0], columns, dropout_p, seed, site)
    return reference.embedding(
        token_ids, token_type_ids, position_ids, word, token_type, position, weight, bias, keep, dropout_p, eps, dtype
    )
