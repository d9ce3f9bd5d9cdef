"""A batch is one packed token stream: sequences end to end, no padding (DESIGN idea 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minbert.kernels.attention import tile_rows


@dataclass(frozen=True)
class Packed:
    """S sequences of N tokens in all, laid end to end; sequence s is `token_ids[cu_seqlens[s]:cu_seqlens[s + 1]]`."""

    token_ids: Tensor  # int64 [N]
    token_type_ids: Tensor  # int64 [N]: 0 up to the first [SEP], 1 in the second sentence of a pair
    position_ids: Tensor  # int64 [N]: position within its own sequence
    cu_seqlens: Tensor  # int32 [S + 1]: cumulative sequence lengths, from 0 to N
    max_seqlen: int  # the longest sequence's length in tokens
    # Of T tasks, task t has sequences sequence_bounds[t] to [t + 1], and tokens token_bounds[t] to [t + 1].
    sequence_bounds: tuple[int, ...] | None = None
    token_bounds: tuple[int, ...] | None = None
    # For attention on a GPU, where no sequence has more than 128 tokens: which sequences it takes together (`_tiles`).
    tiles: tuple[Tensor, Tensor] | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens in each sequence, int32 [S]."""
        return self.cu_seqlens.diff()

    def to(self, device: torch.device | str) -> Packed:
        """The same batch on `device`, copied without waiting for the copy to end."""
        return Packed(
            self.token_ids.to(device, non_blocking=True),
            self.token_type_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_seqlen,
            self.sequence_bounds,
            self.token_bounds,
            self.tiles and (self.tiles[0].to(device, non_blocking=True), self.tiles[1].to(device, non_blocking=True)),
        )

    def by_task(self, counts: Sequence[int]) -> Packed:
        """The same batch, a CPU one, with the tasks' bounds for their numbers of sequences.

        Raises:
            ValueError: the counts do not add up to S.
        """
        bounds = (0, *np.cumsum(counts).tolist())
        if bounds[-1] != len(self.cu_seqlens) - 1:
            raise ValueError(f"counts {list(counts)} must add up to the stream's {len(self.cu_seqlens) - 1} sequences")
        tokens = tuple(self.cu_seqlens[list(bounds)].tolist())
        return replace(self, sequence_bounds=bounds, token_bounds=tokens)


def pack(token_ids: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]] | None = None) -> Packed:
    """Lay sequences of token ids end to end.

    Args:
        token_ids: S sequences of at least one token id each.
        token_type_ids: 0 or 1 for every token, shaped like `token_ids`; all 0 when left out.

    Raises:
        ValueError: no sequence, an empty sequence, or `token_type_ids` of another shape.
    """
    lengths = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
    if len(lengths) == 0:
        raise ValueError("token_ids holds no sequence; pack needs at least one")
    if lengths.min() == 0:
        raise ValueError(f"token_ids[{int(lengths.argmin())}] is empty; every sequence needs at least one token")
    if token_type_ids is None:
        types = np.zeros(lengths.sum(), np.int64)
    elif [len(row) for row in token_type_ids] != lengths.tolist():
        raise ValueError("token_type_ids must have one entry for every token of token_ids")
    else:
        types = np.concatenate([np.asarray(row, np.int64) for row in token_type_ids])
    return pack_flat(np.concatenate([np.asarray(row, np.int64) for row in token_ids]), types, lengths)


def pack_flat(token_ids: np.ndarray, token_type_ids: np.ndarray, lengths: np.ndarray) -> Packed:
    """`pack` for sequences that already lie end to end: ids [N], types [N], lengths [S] (all positive)."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    return Packed(
        torch.from_numpy(np.ascontiguousarray(token_ids, np.int64)),
        torch.from_numpy(np.ascontiguousarray(token_type_ids, np.int64)),
        torch.from_numpy(position_ids),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        int(lengths.max()),
        tiles=_tiles(cu_seqlens, int(lengths.max())),
    )


def _tiles(cu_seqlens: np.ndarray, max_seqlen: int) -> tuple[Tensor, Tensor] | None:
    """Consecutive sequences, as many as fit into a tile of the kernels: int32 [tiles, 2], the first row of each tile
    and the one after its last, and int32 [N], the first row of each token's own sequence. Tiles without rows, (0, 0),
    may be added. None for sequences that are longer than all tiles.
    """
    rows = tile_rows(max_seqlen)
    if rows is None:
        return None
    bounds = [0]
    while bounds[-1] < cu_seqlens[-1]:
        bounds.append(int(cu_seqlens[np.searchsorted(cu_seqlens, bounds[-1] + rows, side="right") - 1]))
    starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    pairs = np.stack([bounds[:-1], bounds[1:]], axis=1)
    return torch.from_numpy(pairs.astype(np.int32)), torch.from_numpy(starts.astype(np.int32))
