"""Shards of a batch: each rank encodes consecutive examples, about as many tokens as another.

Their pooled vectors are all-gathered, and every rank computes all heads and losses, as one process would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError


@dataclass(frozen=True)
class BatchShard:
    """One rank's shard of a packed stream.

    Args:
        group: the ranks that have the stream together.
        sequences: number of sequences of each rank.
        first_token: index in the whole stream of this rank's first token.
        tokens: number of tokens of the whole stream.
        bounds: index of each task's first sequence in the whole stream, and the number of all sequences; None where the
            tasks share one gradient.
    """

    group: ProcessGroup
    sequences: tuple[int, ...]
    first_token: int
    tokens: int
    bounds: tuple[int, ...] | None = None

    def all_gather(self, rows: Tensor) -> Tensor:
        """Concatenate all ranks' vectors [n, D], one for each of a rank's sequences, to [sum of all ranks' n, D].

        The backward gives a rank the gradient of its own rows times the number of ranks: every rank computes the same
        loss of all rows and scales it by 1 / world_size, so the sum of the ranks' gradients is the loss's gradient.
        """
        return _AllGather.apply(rows, self)  # type: ignore[no-any-return]


def shard_examples(
    lengths: Sequence[np.ndarray], sequences_per_example: Sequence[int], group: ProcessGroup
) -> tuple[list[slice], BatchShard]:
    """Divide a batch among the ranks, by tokens.

    Args:
        lengths: tokens of each example, [n] for each task, in the order of the stream.
        sequences_per_example: one number for each task.

    Returns:
        this rank's examples of each task, none of some tasks; and its shard.

    Raises:
        UserError: there are fewer examples than ranks.
    """
    tokens = np.concatenate(lengths)
    if len(tokens) < group.world_size:
        raise UserError(
            f"a batch of {len(tokens)} examples is too small for {group.world_size} processes; give a larger"
            " --batch-size, or fewer processes"
        )
    bounds = split_by_tokens(tokens, group.world_size)
    start, end = bounds[group.rank : group.rank + 2].tolist()
    firsts = np.cumsum([0, *map(len, lengths)])[:-1].tolist()
    own = [slice(max(start - first, 0), max(end - first, 0)) for first in firsts]
    sequences = np.repeat(sequences_per_example, [len(of_task) for of_task in lengths])
    by_rank = tuple(np.add.reduceat(sequences, bounds[:-1]).tolist())
    return own, BatchShard(group, by_rank, int(tokens[:start].sum()), int(tokens.sum()))


def split_by_tokens(lengths: np.ndarray, shards: int) -> np.ndarray:
    """Split examples into consecutive shards of about as many tokens, each of at least one example.

    Args:
        lengths: tokens of each example, [n].

    Returns:
        Bounds of the shards, int64 [shards + 1], from 0 to n.

    Raises:
        ValueError: fewer examples than shards.
    """
    if len(lengths) < shards:
        raise ValueError(f"expected at least {shards} examples for as many shards, got {len(lengths)}")
    ends = np.cumsum(lengths)
    targets = ends[-1] * np.arange(1, shards) / shards
    cuts = np.searchsorted(ends, targets)
    cuts += ends[cuts] - targets < targets - (ends[cuts] - lengths[cuts])  # the nearer end of the example at a target
    numbers = np.arange(shards + 1)
    bounds = np.concatenate([[0], cuts, [len(lengths)]]) - numbers
    return np.minimum(np.maximum.accumulate(np.maximum(bounds, 0)), len(lengths) - shards) + numbers


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: BatchShard) -> Tensor:
        group, counts = shard.group, shard.sequences
        start = sum(counts[: group.rank])
        ctx.own, ctx.world_size = slice(start, start + len(rows)), group.world_size
        padded = rows.new_empty(group.world_size * max(counts), rows.shape[1])
        group.shard(padded)[: len(rows)] = rows
        group.all_gather(padded).wait()
        return torch.cat([of_rank[:count] for of_rank, count in zip(padded.split(max(counts)), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return d_rows[ctx.own] * ctx.world_size, None
