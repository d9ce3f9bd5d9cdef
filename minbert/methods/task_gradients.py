"""A gradient of the shared parameters for every task (or group of tasks), from one backward.

The tasks' sequences lie task after task in one packed stream, and no op mixes tokens of two sequences. So one backward
carries the gradients of all tasks' activations, and each parameter's gradient is summed over every task's segment of
the stream by itself: during the forward each parameter is given as one view per task, and the kernels give each view
the gradient of its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from minbert.kernels.gradient_table import GradientColumns


class TaskGradients:
    """T gradients of a module's trainable parameters.

    Args:
        tasks: T.
        copies: by parameter, a copy in a half precision that forwards read in its place; its gradients then have that
            precision too.

    Attributes:
        params: the parameters, K of them.
        leaves: the tensors whose `.grad` the gradients are: K of each task.
        rows: for each of T tasks its K gradients, in the dtypes of what forwards read; None where its loss reached
            nothing. Backward passes add to them until `clear`. Where all gradients of a parameter are sparse they are
            coalesced, else all are dense.
    """

    def __init__(self, module: nn.Module, tasks: int, copies: Mapping[Tensor, Tensor] | None = None) -> None:
        self.module = module
        self.params = [param for param in module.parameters() if param.requires_grad]
        read = [(copies or {}).get(param, param) for param in self.params]
        self._views = [[tensor.detach().requires_grad_() for tensor in read] for _ in range(tasks)]
        self.leaves = [view for row in self._views for view in row]

    @property
    def rows(self) -> list[list[Tensor | None]]:
        grads, count = self.read(), len(self.params)
        return [grads[task * count : (task + 1) * count] for task in range(len(self._views))]

    def read(self) -> list[Tensor | None]:
        """The gradients of all leaves."""
        grads, count = [leaf.grad for leaf in self.leaves], len(self.params)
        if count and self.params[0].device.type == "cpu":  # on GPUs no op gives sparse ones
            for k in {i % count for i, grad in enumerate(grads) if grad is not None and grad.is_sparse}:
                grads[k::count] = _alike(self.leaves[k::count])
        return grads

    @cached_property
    def columns(self) -> GradientColumns:
        """What stays the same of the gradients of update after update."""
        return GradientColumns(self.params, len(self._views), self._views[0] if self._views else None)

    @contextmanager
    def attached(self, task: int | None = None) -> Iterator[None]:
        """Let a forward in this block, and the backward of what it computes, add to the rows.

        Args:
            task: the only task in the stream; when left out all tasks are, and the stream says which rows are whose
                (`Packed.by_task`).
        """
        rows = self._views if task is None else [self._views[task]]
        views = dict(zip(self.params, zip(*rows, strict=True), strict=True)) if self.params else {}

        def replacement(param: nn.Parameter) -> Tensor | Sequence[Tensor]:
            of_param = views.get(param, (param,))
            return of_param if len(of_param) > 1 else of_param[0]

        with substituted(self.module, replacement):
            yield

    def clear(self) -> None:
        """Forget all gradients."""
        for leaf in self.leaves:
            leaf.grad = None


def _alike(views: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of a parameter's views, some of them sparse: all dense, or all sparse and coalesced."""
    dense = not all(view.grad.is_sparse for view in views if view.grad is not None)
    for view in views:
        if view.grad is not None:
            view.grad = view.grad.to_dense() if dense else coalesced(view.grad)
    return [view.grad for view in views]


def coalesced(grad: Tensor) -> Tensor:
    """A sparse gradient with each row once. Those of one backward are so, which autograd does not record."""
    rows = grad._indices()
    if grad.is_coalesced() or not (rows.diff() > 0).all():
        return grad.coalesce()
    return torch.sparse_coo_tensor(rows, grad._values(), grad.shape, check_invariants=False, is_coalesced=True)


@contextmanager
def substituted(module: nn.Module, replacement: Callable[[nn.Parameter], Tensor | Sequence[Tensor]]) -> Iterator[None]:
    """Have the module's forward read `replacement(param)` in place of each parameter."""
    places = [
        (owner._parameters, name, param)
        for owner in module.modules()
        for name, param in owner._parameters.items()
        if param is not None
    ]
    try:
        for parameters, name, param in places:
            parameters[name] = replacement(param)  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, param in places:
            parameters[name] = param
