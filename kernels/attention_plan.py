"""What attention computes, and how a GPU divides it: short sequences share tiles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks


class AttentionPlan(NamedTuple):
    """The tiles of a stream of N tokens. A tile takes the rows of consecutive whole sequences."""

    tile_bounds: Tensor  # int32 [tiles, 2]: the first row of each tile and the row after its last
    starts: Tensor  # int32 [N]: the first row of each token's sequence


class AttentionProblem(NamedTuple):
    """The arguments of the attention ops, described in `attention` and `first_token_attention`."""

    qkv: Tensor  # [N, 3, H, d]; of first tokens the keys and values, [N, 2, H, d]
    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int
    dropout_p: float
    seed: Tensor | None  # int64 [2], None where dropout_p is 0
    stream_id: int
    scale: float
    tile_bounds: Tensor | None = None  # as in AttentionPlan
    starts: Tensor | None = None


def tile_rows(max_seqlen: int) -> int | None:
    """Rows of a tile for sequences of up to `max_seqlen` tokens; None for sequences longer than every tile."""
    return next((rows for rows in (32, 64, 128) if max_seqlen <= rows), None)


def attention_plan(
    cu_seqlens: np.ndarray | Tensor, max_seqlen: int, *, fixed_size: bool = False
) -> AttentionPlan | None:
    """Group consecutive sequences into tiles, as many in each as fit.

    Args:
        cu_seqlens: integers [S + 1], cumulative sequence lengths from 0 to N; a tensor must be on the CPU.
        max_seqlen: the longest sequence's length in tokens, or an upper bound of it.
        fixed_size: append empty tiles (0, 0) up to the largest number of tiles that a stream of N tokens in S sequences
            can have, so that all such streams have plans of one size, as CUDA graphs need.

    Returns:
        The plan for `attention`, on the CPU; None if max_seqlen is more than 128: attention then needs none.

    Raises:
        ValueError: cu_seqlens does not increase from 0, or max_seqlen is less than the longest sequence.
    """
    rows = tile_rows(max_seqlen)
    if rows is None:
        return None
    cu_seqlens = np.asarray(cu_seqlens)
    lengths = np.diff(cu_seqlens)
    if cu_seqlens[0] != 0 or lengths.min() < 1 or lengths.max() > max_seqlen:
        checks.cu_seqlens_values("attention_plan", cu_seqlens, max_seqlen=max_seqlen)  # raises the error
    bounds = [0]
    while bounds[-1] < cu_seqlens[-1]:
        bounds.append(int(cu_seqlens[np.searchsorted(cu_seqlens, bounds[-1] + rows, side="right") - 1]))
    tiles = np.stack([bounds[:-1], bounds[1:]], axis=1)
    if fixed_size:  # two neighbouring tiles have more than `rows` rows together
        most = min(len(cu_seqlens) - 1, 2 * int(cu_seqlens[-1]) // (rows + 1) + 1)
        tiles = np.concatenate([tiles, np.zeros((most - len(tiles), 2), tiles.dtype)])
    starts = np.repeat(cu_seqlens[:-1], lengths)
    return AttentionPlan(torch.from_numpy(tiles.astype(np.int32)), torch.from_numpy(starts.astype(np.int32)))
