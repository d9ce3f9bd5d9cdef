"""Copies between host and device that wait for nothing: many tensors in one copy there, many scalars in one back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; more than any kernel asks of its inputs


class Layout:
    """The offsets of several tensors in one buffer of `size` bytes."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes = [(tensor.dtype, tensor.shape, tensor.numel() * tensor.element_size()) for tensor in tensors]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for _, _, size in self.shapes]
        *self.offsets, self.size = accumulate(padded, initial=0)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer of `size` bytes, sharing its memory."""
        parts = zip(self.offsets, self.shapes, strict=True)
        return [buffer[start : start + size].view(dtype).view(shape) for start, (dtype, shape, size) in parts]


def copy_to_buffer(tensors: Sequence[Tensor], layout: Layout, *, pinned: bool) -> Tensor:
    """Copy CPU tensors to one buffer; from pinned memory a GPU copies while the host goes on.

    torch keeps pinned memory that is freed until the copies from it are done.
    """
    buffer = torch.empty(layout.size, dtype=torch.uint8, pin_memory=pinned)
    for view, tensor in zip(layout.views(buffer), tensors, strict=True):
        view.copy_(tensor)
    return buffer


def copy_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on `device`, without waiting for the copy to end; the same tensors where that is the CPU."""
    if device.type == "cpu":
        return list(tensors)
    layout = Layout(tensors)
    return layout.views(copy_to_buffer(tensors, layout, pinned=True).to(device, non_blocking=True))


class Readback:
    """Numbers that a device computes, in one copy to the host that starts at once; `read` waits for it."""

    def __init__(
        self, numbers: Mapping[Hashable, Sequence[Tensor]], wait: Callable[[Any], None] = torch.cuda.Event.synchronize
    ) -> None:
        """Start the copy.

        Args:
            numbers: tensors of any float dtype and shape, on one device; those of one name are read end to end.
            wait: waits for a CUDA event.
        """
        self._wait = wait
        by_dtype: dict[torch.dtype, list[tuple[Hashable, Tensor]]] = defaultdict(list)
        for name, tensors in numbers.items():
            for tensor in tensors:
                by_dtype[tensor.dtype].append((name, tensor))
        self._names = list(numbers)
        self._sizes = [(name, tensor.numel()) for of_dtype in by_dtype.values() for name, tensor in of_dtype]
        with torch.no_grad():
            joined = [_joined([tensor for _, tensor in of_dtype]).double() for of_dtype in by_dtype.values()]
            flat = torch.cat(joined)
        self._copied = None
        if flat.device.type == "cuda":
            flat, source = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True), flat
            flat.copy_(source, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(source.device))
        self._flat = flat

    def read(self) -> dict[Hashable, list[float]]:
        """The numbers by name, each flat."""
        if self._copied is not None:
            self._wait(self._copied)
        found: dict[Hashable, list[float]] = {name: [] for name in self._names}
        values = iter(self._flat.tolist())
        for name, size in self._sizes:
            found[name] += islice(values, size)
        return found


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of some tensors of one dtype, flat, by one kernel."""
    if not any(tensor.dim() for tensor in tensors):
        return torch.stack(list(tensors))
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
