"""Forward and backward of a batch as CUDA graphs, one for each shape of batch: a replay costs the host one launch.

Every shape and address is built into a graph. So batches come in buckets of token counts (`pack_batches`), and each
graph reads its batch from a buffer of its own, into which the next batch is copied before a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minbert.training.batches import Batch
from minbert.training.host_device_copy import Layout, copy_to_buffer
from minbert.training.objective import Losses

MOST_GRAPHS = 64  # each keeps a few megabytes on the device

Compute = Callable[[Batch], Losses]


@dataclass(frozen=True)
class Graph:
    """A captured graph, the buffer it reads, and what a replay overwrites: losses, and the leaves' gradients."""

    graph: Any
    layout: Layout
    buffer: Tensor
    losses: Losses
    grads: list[Tensor | None]


class CudaGraphs:
    """Runs `compute` on batches of CPU tensors, from graphs where it can.

    A batch of a new shape runs without a graph, which also compiles its kernels. The second batch of a shape is
    captured, and all later ones are replays. The next call overwrites losses and gradients.

    Args:
        compute: computes the losses of a batch on the device, and their gradients in the `.grad` of `leaves`, which are
            None before.
        leaves: the tensors that `compute` differentiates with respect to.
        capture: captures `compute` on a batch.
        most: graphs to keep.
    """

    def __init__(
        self,
        compute: Compute,
        leaves: Sequence[Tensor],
        device: torch.device,
        capture: Callable[[Compute, Batch, Sequence[Tensor], torch.device], Graph] | None = None,
        most: int = MOST_GRAPHS,
    ) -> None:
        self.compute, self.leaves, self.device, self.most = compute, list(leaves), device, most
        self._capture = Capture() if capture is None else capture
        self._seen: set[Any] = set()
        self._graphs: dict[Any, Graph] = {}

    def __call__(self, batch: Batch) -> Losses:
        key = _shape(batch)
        if key not in self._graphs:
            if key not in self._seen or len(self._graphs) >= self.most:
                self._seen.add(key)
                return self.compute(batch.to(self.device))
            self._graphs[key] = self._capture(self.compute, batch, self.leaves, self.device)
        found = self._graphs[key]
        pinned = self.device.type == "cuda"
        found.buffer.copy_(copy_to_buffer(batch.tensors, found.layout, pinned=pinned), non_blocking=True)
        found.graph.replay()
        for leaf, grad in zip(self.leaves, found.grads, strict=True):
            leaf.grad = grad
        return found.losses


class Capture:
    """Captures graphs that share their memory: each call uses up the results of the one before."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Compute, batch: Batch, leaves: Sequence[Tensor], device: torch.device) -> Graph:
        layout = Layout(batch.tensors)
        buffer = torch.zeros(layout.size, dtype=torch.uint8, device=device)
        batch = batch.with_tensors(layout.views(buffer))
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            losses = compute(batch)
        losses = losses.map(unowned_view)
        grads = [None if leaf.grad is None else unowned_view(leaf.grad) for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return Graph(graph, layout, buffer, losses, grads)


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


def unowned_view(tensor: Tensor) -> Tensor:
    """A tensor in the same memory that does not keep it alive: the graph owns it, and its replays write it."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    memory = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=tensor.device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
