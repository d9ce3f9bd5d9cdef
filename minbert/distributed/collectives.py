"""Asynchronous reduce-scatter and all-gather: torch's over NCCL; over gloo sends and receives, which are faster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Wait = Callable[[], object]

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # until torch 2.12
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def reduce_scatter(output: Tensor, input: Tensor, backend: str, tag: int) -> Wait:
    """Start to write this rank's shard of the sum of all ranks' `input` [world_size * n] to `output` [n].

    The sum has `output`'s precision, and what is sent has `input`'s. NCCL sums in the precision of what it sends, so
    where the two differ the ranks exchange their shards.

    Args:
        backend: `nccl` for torch's collectives, `gloo` for sends and receives.
        tag: the number of the collective, the same on all ranks; other collectives at the same time have others.
    """
    if backend == "nccl":
        if output.dtype != input.dtype:
            return _exchange_and_sum(output, input)
        return _reduce_scatter(output, input, async_op=True).wait  # type: ignore[no-any-return]
    shards, received = (tensor.chunk(dist.get_world_size()) for tensor in (input, torch.empty_like(input)))
    arrivals = _exchange(shards, received, tag)

    def wait() -> None:
        total = shards[dist.get_rank()].to(output.dtype)
        for rank in arrivals:
            total = torch.add(total, received[rank], out=output)

    return wait


def all_gather(output: Tensor, input: Tensor, backend: str, tag: int) -> Wait:
    """Start to concatenate all ranks' `input` [n] in `output` [world_size * n], of which it is this rank's shard."""
    if backend == "nccl":
        return _all_gather(output, input, async_op=True).wait  # type: ignore[no-any-return]
    arrivals = _exchange([input] * dist.get_world_size(), output.chunk(dist.get_world_size()), tag)
    return lambda: deque(arrivals, maxlen=0)


def reduce_scatter_rows(matrix: Tensor, size: int, tags: Sequence[int]) -> tuple[Tensor, Wait, int]:
    """Start to sum all ranks' sparse matrices, over gloo: of this rank's rows each other rank gets those of its shard.

    Args:
        matrix: coalesced, with one sparse dimension; all ranks' have the same shape.
        size: of a shard, in elements of the flattened matrix, which may be cut within a row.
        tags: three, as for `reduce_scatter`.

    Returns:
        this rank's shard of the sum, dense and flat [size], which is complete after the wait; and how many bytes this
        rank sends.
    """
    rank, ranks, (rows, columns) = dist.get_rank(), range(dist.get_world_size()), matrix.shape
    ids, values = matrix.indices()[0], matrix.values()
    firsts = [min(rows, shard * size // columns) for shard in ranks]
    ends = [-(-(shard + 1) * size // columns) for shard in ranks]
    cuts = [slice(*torch.searchsorted(ids, torch.tensor(pair)).tolist()) for pair in zip(firsts, ends, strict=True)]
    sent = [torch.tensor([cut.stop - cut.start]) for cut in cuts]
    counts = [torch.zeros(1, dtype=torch.int64) for _ in ranks]
    deque(_exchange(sent, counts, tags[0]), maxlen=0)
    received_ids = [ids.new_empty(int(count)) for count in counts]
    received = [values.new_empty(int(count), columns) for count in counts]
    arrivals = _exchange([ids[cut] for cut in cuts], received_ids, tags[1])
    arrivals_of_values = _exchange([values[cut] for cut in cuts], received, tags[2])
    start = firsts[rank]
    total = values.new_zeros(ends[rank] - start, columns)
    total[ids[cuts[rank]] - start] = values[cuts[rank]]

    def wait() -> None:
        deque(arrivals, maxlen=0)
        for source in arrivals_of_values:
            total[received_ids[source] - start] += received[source]  # each row once

    others = [shard for shard in ranks if shard != rank]
    nbytes = sum(tensor.nbytes for shard in others for tensor in (sent[shard], ids[cuts[shard]], values[cuts[shard]]))
    return total.view(-1)[rank * size - start * columns :][:size], wait, nbytes


def _exchange_and_sum(output: Tensor, input: Tensor) -> Wait:
    """`reduce_scatter` over NCCL without a sum on the way; after the wait this rank adds up, all at once."""
    received = torch.empty_like(input)
    exchanged = dist.all_to_all_single(received, input, async_op=True)

    def wait() -> None:
        exchanged.wait()
        torch.sum(received.view(-1, output.numel()), 0, dtype=output.dtype, out=output)

    return wait


def _exchange(send: Sequence[Tensor], receive: Sequence[Tensor], tag: int) -> Iterator[int]:
    """Start to send `send[r]` to each other rank r and to receive `receive[r]`; yield the ranks of tensors received."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    receives: dict[int, Any] = {}
    sends: list[Any] = []
    for distance in range(1, world_size):
        target, source = (rank + distance) % world_size, (rank - distance) % world_size
        receives[source] = dist.irecv(receive[source], source, tag=tag)
        sends.append(dist.isend(send[target], target, tag=tag))

    def arrivals() -> Iterator[int]:
        for source, work in receives.items():
            work.wait()
            yield source
        for work in sends:
            work.wait()

    return arrivals()
