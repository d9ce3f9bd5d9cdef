"""Forward and backward of a batch as CUDA graphs, one for each shape of batch: a replay costs the host one launch.

Every shape and address is built into a graph. So batches come in few shapes (`minbert.data.buckets`), and each graph
reads its batch from a buffer of its own, into which the next batch is copied before a replay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minbert import kernels
from minbert.config import TrainConfig
from minbert.data.packing import Packed
from minbert.distributed.process_group import ProcessGroup
from minbert.kernels import flight_recorder
from minbert.model import EncoderConfig
from minbert.training.batches import Batch
from minbert.training.host_device_copy import Layout, copy_to_buffer
from minbert.training.objective import Losses

MOST_GRAPHS = 64  # each takes a few megabytes on the device; tasks in steps of their own have shapes of their own
OPS = (
    "attention",
    "bias_gelu",
    "dropout",
    "dropout_add_layer_norm",
    "embedding",
    "first_token_attention",
)  # of forward and backward
SMART_OPS = ("smart_ascend", "smart_init")

Compute = Callable[[Batch], Losses]


def reason_against(config: TrainConfig, encoder: EncoderConfig, group: ProcessGroup) -> str | None:
    """Why the steps of a run on a GPU are not replayed; None where they are.

    The references of some ops read numbers of the device, which no capture can, so all of a step's have to be compiled.

    Args:
        config: with a precision.
    """
    if not config.cuda_graphs:
        return "--cuda-graphs false"
    if flight_recorder.is_on():
        return "a replay calls no op, and calls are recorded"
    if config.accumulate > 1 or config.low_memory:
        return "a step has several streams (--accumulate, --low-memory)"
    if group.world_size > 1:
        return f"{group.world_size} processes"
    dtype, columns = torch.bfloat16 if config.precision == "bf16" else torch.float32, encoder.hidden_size
    sizes = {"columns": columns, "head_dim": columns // encoder.num_attention_heads}
    found = kernels.backends(group.device, explain=True, dtype=dtype, **sizes)
    for op in (*OPS, *(SMART_OPS if config.smart.on else ())):
        if found[op].runs == "reference":
            *_, reasons = found[op].not_available.values()  # the last are of the GPU's code
            return f"{op} runs in plain PyTorch ({'; '.join(reasons)})"
    return None


@dataclass(frozen=True)
class Graph:
    """A captured graph, the buffer it reads, and what a replay overwrites: losses, and the leaves' gradients."""

    graph: Any
    layout: Layout
    buffer: Tensor
    losses: Losses
    grads: list[Tensor | None]


def warn(line: str) -> None:
    sys.stderr.write(f"{line}\n")


class CudaGraphs:
    """Runs `compute` on batches of CPU tensors, from graphs where it can.

    A batch of a new shape runs without a graph, which also compiles its kernels. The second batch of a shape is
    captured, and all later ones are replays, unless the `most` shapes have graphs already. The next call overwrites
    losses and gradients. Replays are on the device's current stream.

    A graph stays as long as this does: from torch 2.12 on the end of one frees the cuBLAS workspaces of the stream of
    its capture, to which the other graphs write.

    A step that cannot be captured runs without a graph, and so does every later one that has none.

    Args:
        compute: computes the losses of a batch on the device, and their gradients in the `.grad` of `leaves`, which are
            None before.
        leaves: the tensors that `compute` differentiates with respect to.
        capture: captures `compute` on a batch.
        most: graphs.

    Attributes:
        report: is given a line when a capture fails.
        replayed: the leaves' gradients, where the last call was a replay: always the same list for each graph. None
            where they are in `.grad`.
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
        self.report: Callable[[str], None] = warn
        self.replayed: list[Tensor | None] | None = None
        self._capture = Capture() if capture is None else capture
        self._captures = True
        self._seen: set[Any] = set()
        self._graphs: dict[Any, Graph] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Losses:
        key = _shape(batch)
        if key not in self._graphs and key in self._seen and self._captures and len(self._graphs) < self.most:
            self._add_graph(key, batch)
        if key not in self._graphs:
            self._seen.add(key)
            self.replayed = None
            with self._on_own_stream():
                return self.compute(batch.to(self.device)).map(Tensor.detach)
        found = self._graphs[key]
        pinned = self.device.type == "cuda"
        found.buffer.copy_(copy_to_buffer(batch.tensors, found.layout, pinned=pinned), non_blocking=True)
        found.graph.replay()
        self.replayed = found.grads
        return found.losses

    def _add_graph(self, key: Any, batch: Batch) -> None:
        """Capture a graph of the batch's shape."""
        try:
            with self._on_own_stream():
                self._graphs[key] = self._capture(self.compute, batch, self.leaves, self.device)
        except RuntimeError as error:
            self._captures = False
            why, *_ = str(error).splitlines() or [type(error).__name__]
            self.report(f"warning: no more CUDA graphs: a step cannot be captured ({why}); it runs without")
            for leaf in self.leaves:
                leaf.grad = None

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """Run the block on the stream of captures, which cannot be a device's default stream.

        Steps without a graph run there too: what autograd and cuBLAS keep for each stream is there before a capture.
        """
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):  # and on its device
            yield
        current.wait_stream(self._stream)


class Capture:
    """Captures graphs on the current stream that share their memory: each call uses up the results of the one before.

    Unlike `torch.cuda.graph` it waits for no work and frees no memory that torch keeps, and after an error the current
    stream is the one from before. Other threads may use the device meanwhile.
    """

    _unfinished: list[Any] = []  # noqa: RUF012  torch's allocator goes on asking captures that failed for their number

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Compute, batch: Batch, leaves: Sequence[Tensor], device: torch.device) -> Graph:
        layout = Layout(batch.tensors)
        buffer = torch.zeros(layout.size, dtype=torch.uint8, device=device)
        batch = batch.with_tensors(layout.views(buffer))
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._unfinished.append(graph)
        renew_generator(device)  # a capture that fails leaves its own state unusable, which no other graph may hold
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            losses = compute(batch)
            graph.capture_end()
        except BaseException:
            with suppress(RuntimeError):  # it says again that the capture has failed
                graph.capture_end()
            renew_generator(device)
            raise
        self._unfinished.remove(graph)
        losses = losses.map(unowned_view)
        grads = [None if leaf.grad is None else unowned_view(leaf.grad) for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return Graph(graph, layout, buffer, losses, grads)


def renew_generator(device: torch.device) -> None:
    """Give torch's generator of a GPU another state, equal to its own, which a failed capture leaves unusable."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        generator.graphsafe_set_state(generator.clone_state())


def _shape(batch: Batch) -> Any:
    """All that is built into a graph: equal for batches that differ in the numbers of their tensors alone."""
    tensors = tuple((tensor.dtype, tensor.shape) for tensor in batch.tensors)
    parts = tuple(
        tuple((part.tasks, part.first_token, _bounds(part.packed)) for part in of_regulariser)
        for of_regulariser in (batch.smart_parts, batch.rdrop_parts)
    )
    return tensors, _bounds(batch.packed), parts, tuple(batch.counts.items())


def _bounds(packed: Packed) -> Any:
    return packed.max_seqlen, packed.padding, packed.sequence_bounds, packed.token_bounds


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
