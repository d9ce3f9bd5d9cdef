"""BERT's embedding block."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .random import dropout_mask


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
) -> Tensor:
    """dropout(LayerNorm(word + token type + position)) for every token (Devlin et al. 2019, section 3).

    Args:
        token_ids, token_type_ids, position_ids: int64 [N], rows of the three tables.
        word, token_type, position: float [V, D], [types, D], [positions, D], of one dtype.
        weight, bias: float [D], of the layer norm.
        eps: added to the variance.
        dropout_p, seed, site: as for `dropout_mask`; `seed` is needed when dropout_p > 0.

    Returns:
        [N, D], of the tables' dtype.

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
    keep = None
    if dropout_p > 0 and seed is not None:
        keep = dropout_mask(token_ids.shape[0], columns, dropout_p, seed, site)
    return reference.embedding(
        token_ids, token_type_ids, position_ids, word, token_type, position, weight, bias, keep, dropout_p, eps
    )
