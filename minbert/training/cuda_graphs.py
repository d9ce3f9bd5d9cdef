"""Forward and backward of a batch as CUDA graphs, one for each shape of batch: a replay costs the host one launch.

A graph has every shape and address built in. So batches come in buckets of token counts (`pack_batches`), and each
graph reads its batch from one buffer of its own, into which the next batch is copied before a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minbert.training.host_device_copy import Layout, gathered, moved
from minbert.training.objective import Batch, Losses

MOST_GRAPHS = 64  # each keeps a few megabytes on the device

Compute = Callable[[Batch], Losses]


@dataclass(frozen=True)
class Captured:
    """A graph, the buffer it reads, and what it leaves behind: losses, and the leaves' gradients."""

    graph: Any
    layout: Layout
    buffer: Tensor
    losses: Losses
    grads: list[Tensor | None]


class Replay:
    """Runs `compute` on batches of the CPU's tensors.

    A shape of batch that was not seen before runs as it is, which also compiles what it needs. The second batch of that
    shape is captured, and all later ones are replays. Losses and gradients are overwritten by the next call.

    Args:
        compute: the losses of a batch on the device, and their gradients in the `.grad` of `leaves`, None before.
        leaves: what `compute` differentiates with respect to.
    """

    def __init__(self, compute: Compute, leaves: Sequence[Tensor], device: torch.device) -> None:
        self.compute, self.leaves, self.device = compute, list(leaves), device
        self._seen: set[Any] = set()
        self._graphs: dict[Any, Captured] = {}
        self._pool: Any = None

    def __call__(self, batch: Batch) -> Losses:
        key = _shape(batch)
        if key not in self._graphs:
            if key not in self._seen or len(self._graphs) >= MOST_GRAPHS:
                self._seen.add(key)
                return self.compute(batch.with_tensors(moved(batch.tensors, self.device)))
            self._graphs[key] = self._capture(batch)
        found = self._graphs[key]
        pinned = self.device.type == "cuda"
        found.buffer.copy_(gathered(batch.tensors, found.layout, pinned=pinned), non_blocking=True)
        found.graph.replay()
        for leaf, grad in zip(self.leaves, found.grads, strict=True):
            leaf.grad = grad
        return found.losses

    def _capture(self, batch: Batch) -> Captured:
        """All graphs share their memory: none needs anything of the others', since each call uses up what it leaves."""
        layout = Layout(batch.tensors)
        buffer = torch.zeros(layout.size, dtype=torch.uint8, device=self.device)
        batch = batch.with_tensors(layout.views(buffer))
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            losses = self.compute(batch)
        losses, grads = (
            losses.map(borrowed),
            [None if leaf.grad is None else borrowed(leaf.grad) for leaf in self.leaves],
        )
        for leaf in self.leaves:
            leaf.grad = None
        return Captured(graph, layout, buffer, losses, grads)


def _shape(batch: Batch) -> Any:
    tensors = tuple((tensor.dtype, tensor.shape) for tensor in batch.tensors)
    packed = batch.packed
    return tensors, packed.max_seqlen, packed.padding, packed.token_bounds, tuple(batch.counts.items())


class _Memory:
    """Some of a GPU's memory, for torch to make a tensor of that does not own it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def borrowed(tensor: Tensor) -> Tensor:
    """A tensor in the same memory that does not keep it: a graph's own, which the graph alone writes."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    memory = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=tensor.device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
