"""A batch is one packed token stream: sequences end to end, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minbert.kernels import AttentionPlan, attention_plan


class IdRanges(NamedTuple):
    """The smallest and the largest of some tokens' ids, and of their types'."""

    token_ids: tuple[int, int]
    token_type_ids: tuple[int, int]


def id_ranges(token_ids: np.ndarray, token_type_ids: np.ndarray) -> IdRanges:
    """Those of at least one token."""
    tokens, types = ((int(ids.min()), int(ids.max())) for ids in (token_ids, token_type_ids))
    return IdRanges(tokens, types)


@dataclass(frozen=True)
class Packed:
    """S sequences of N tokens in all, laid end to end; sequence s is `token_ids[cu_seqlens[s]:cu_seqlens[s + 1]]`."""

    token_ids: Tensor  # int64 [N]
    token_type_ids: Tensor  # int64 [N]: 0 up to the first [SEP], 1 in the second sentence of a pair
    position_ids: Tensor  # int64 [N]: position within its own sequence
    cu_seqlens: Tensor  # int32 [S + 1]: cumulative sequence lengths, from 0 to N
    max_seqlen: int  # the longest sequence's length in tokens
    attention_plan: AttentionPlan | None = None  # for `kernels.attention`
    padding: int = 0  # sequences that each task has after its own (`minbert.data.buckets`)
    # Of T tasks, task t has sequences sequence_bounds[t] to [t + 1], and tokens token_bounds[t] to [t + 1].
    sequence_bounds: tuple[int, ...] | None = None
    token_bounds: tuple[int, ...] | None = None
    id_ranges: IdRanges | None = None  # of `pack`: ids that are on a GPU are checked by them, which waits for nothing

    @property
    def lengths(self) -> Tensor:
        """Tokens in each sequence, int32 [S]."""
        return self.cu_seqlens.diff()

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order that `with_tensors` knows."""
        return [
            self.token_ids,
            self.token_type_ids,
            self.position_ids,
            self.cu_seqlens,
            *(self.attention_plan or ()),
        ]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Packed:
        """The same batch in other memory, on another device for one."""
        token_ids, token_type_ids, position_ids, cu_seqlens, *plan = tensors
        return replace(
            self,
            token_ids=token_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            attention_plan=AttentionPlan(*plan) if plan else None,
        )

    def to(self, device: torch.device | str) -> Packed:
        """The same batch on `device`, copied without waiting for the copy to end."""
        return self.with_tensors([tensor.to(device, non_blocking=True) for tensor in self.tensors])

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

    def part(self, start: int, end: int) -> Packed:
        """The sequences from `start` to `end` of a CPU batch, as a batch that shares its memory."""
        first, last = (int(self.cu_seqlens[sequence]) for sequence in (start, end))
        cu_seqlens = self.cu_seqlens[start : end + 1] - first
        max_seqlen = self.max_seqlen if self.padding else int(cu_seqlens.diff().max())

        def clipped(bounds: tuple[int, ...] | None, low: int, high: int) -> tuple[int, ...] | None:
            return None if bounds is None else tuple(min(max(bound, low), high) - low for bound in bounds)

        return Packed(
            self.token_ids[first:last],
            self.token_type_ids[first:last],
            self.position_ids[first:last],
            cu_seqlens,
            max_seqlen,
            attention_plan(cu_seqlens.numpy(), max_seqlen, fixed_size=self.padding > 0),
            self.padding,
            clipped(self.sequence_bounds, start, end),
            clipped(self.token_bounds, first, last),
            self.id_ranges,
        )


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
    ids = np.concatenate([np.asarray(row, np.int64) for row in token_ids])
    return replace(pack_flat(ids, types, lengths), id_ranges=id_ranges(ids, types))


def pack_flat(
    token_ids: np.ndarray, token_type_ids: np.ndarray, lengths: np.ndarray, max_seqlen: int = 0, padding: int = 0
) -> Packed:
    """`pack` for sequences that already lie end to end: ids [N], types [N], lengths [S] (all positive)."""
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    starts = np.repeat(cu_seqlens[:-1], lengths)
    position_ids = np.arange(cu_seqlens[-1]) - starts
    max_seqlen = max(max_seqlen, int(lengths.max()))
    return Packed(
        torch.from_numpy(np.ascontiguousarray(token_ids, np.int64)),
        torch.from_numpy(np.ascontiguousarray(token_type_ids, np.int64)),
        torch.from_numpy(position_ids),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen,
        attention_plan(cu_seqlens, max_seqlen, fixed_size=padding > 0),
        padding,
    )
