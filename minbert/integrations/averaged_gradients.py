"""Means over the processes of a group: of task gradients, in flat buckets, and of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 2**25  # bytes of a bucket; DistributedDataParallel's have as many


def processes(group: dist.ProcessGroup | None) -> int:
    """How many processes the group has; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def reached_anywhere(
    where: str, reached: Tensor, losses: Tensor, given: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What all processes know of an update before they average its gradients.

    Args:
        where: the method that messages name.
        reached: bool [T, K], the parameters that this process's losses reach.
        losses: float64 [T], 0 where there is none here.
        given: bool [T], whether there is one here.

    Returns:
        the same over all processes: whether a loss of one reaches a parameter, the mean of the losses, and whether one
        has such a loss.

    Raises:
        ValueError: the processes have not the same number of losses and parameters.
    """
    shape = torch.tensor(reached.shape, device=losses.device)
    extremes = torch.cat([shape, -shape])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    most, least = extremes.tolist()[:2], (-extremes).tolist()[2:]
    if most != least:
        what = "losses" if most[0] != least[0] else "parameters"
        index = 0 if most[0] != least[0] else 1
        raise ValueError(
            f"{where}: all processes must have the same number of {what}, got {least[index]} in one and {most[index]}"
            f" in another{'; give None for a task without examples' * (index == 0)}"
        )
    flat = torch.cat([losses, given.double(), reached.flatten().double()])
    dist.all_reduce(flat, group=group)
    total, having, reaching = flat.split([len(losses), len(losses), reached.numel()])
    return reaching.view_as(reached) > 0, total / processes(group), having > 0


def averaged(grads: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The means over the processes, by an all-reduce for each bucket of gradients of one dtype.

    The result has the strides of `grads`, which stay as they are.
    """
    results = list(grads)
    works = []
    for bucket in _buckets(grads):
        flat = torch.cat([grads[index].reshape(-1) for index in bucket])
        works.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in works:
        work.wait()
        flat /= processes(group)
        for index, values in zip(bucket, flat.split([grads[index].numel() for index in bucket]), strict=True):
            grad = grads[index]
            values = values.view(grad.shape)
            results[index] = values if values.stride() == grad.stride() else torch.empty_like(grad).copy_(values)
    return results


def _buckets(grads: Sequence[Tensor]) -> list[list[int]]:
    """The gradients' indices, in buckets of one dtype and of about `BUCKET` bytes."""
    buckets: list[list[int]] = []
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        size = BUCKET
        for index, grad in enumerate(grads):
            if grad.dtype != dtype:
                continue
            if size >= BUCKET:
                buckets.append([])
                size = 0
            buckets[-1].append(index)
            size += grad.nbytes
    return buckets
