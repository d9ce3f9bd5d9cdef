"""Parameters of several tasks: one view of them for each task, which gets the gradient of the task's own rows.

A training step runs the sequences of all tasks in one packed stream, each task's rows together. Given a parameter as T
views of the same memory, an op reads the first in its forward, and in its backward sums each view's gradient over its
task's rows alone. A plain tensor is the view of a single task that has all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Parameter = Tensor | Sequence[Tensor]


def first(parameter: Parameter) -> Tensor:
    """The parameter itself, or its first view."""
    return parameter if isinstance(parameter, Tensor) else parameter[0]


def views(
    op: str, rows: int, bounds: Sequence[int] | None, **params: Parameter
) -> tuple[list[list[Tensor]], list[int]]:
    """Every parameter as a list of views, and the bounds of their rows.

    Args:
        bounds: T + 1 numbers: rows bounds[t] to bounds[t + 1] are task t's. Of no meaning where no parameter is split.

    Raises:
        ValueError, TypeError: some parameters are split and others not, views are not of one tensor, or the bounds do
            not cut `rows` rows into as many parts as there are views.
    """
    if all(isinstance(param, Tensor) for param in params.values()):
        return [[param] for param in params.values()], [0, rows]  # type: ignore[list-item]
    if bounds is None:
        raise ValueError(f"{op}: parameters given as one view per task need bounds, the rows of each task; got None")
    for name, param in params.items():
        if isinstance(param, Tensor):
            raise ValueError(f"{op}: {name} must be a list of {len(bounds) - 1} views like the others, got a tensor")
        if len(param) != len(bounds) - 1:
            raise ValueError(f"{op}: {name} must hold a view for each of {len(bounds) - 1} tasks, got {len(param)}")
        for t, view in enumerate(param):
            if not isinstance(view, Tensor):
                raise TypeError(f"{op}: {name}[{t}] must be a tensor, got {type(view).__name__}")
            if not (torch.compiler.is_compiling() or _same(view, param[0])):
                raise ValueError(f"{op}: {name}[{t}] must be a view of all of {name}[0]; write param.detach()")
    if bounds[0] != 0 or bounds[-1] != rows or any(start > end for start, end in pairwise(bounds)):
        raise ValueError(f"{op}: bounds must rise from 0 to the {rows} rows of x, got {list(bounds)}")
    return [list(param) for param in params.values()], list(bounds)


def _same(view: Tensor, other: Tensor) -> bool:
    same = view.data_ptr() == other.data_ptr() and view.shape == other.shape
    return same and view.stride() == other.stride() and view.dtype == other.dtype


def segments(bounds: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The number and the rows of each task that has some."""
    for t, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield t, slice(start, end)


def longest(bounds: Sequence[int]) -> int:
    """The number of rows of the task that has most."""
    return max(end - start for start, end in pairwise(bounds))


def by_segment(bounds: Sequence[int], op: Callable[[int, slice], Tensor]) -> Tensor:
    """The rows that `op` gives for each task, put together: how the references state what views mean."""
    if len(bounds) == 2:
        return op(0, slice(None))
    return torch.cat([op(t, rows) for t, rows in segments(bounds)])
