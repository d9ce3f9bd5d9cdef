"""The task gradients of update after update: what stays the same is worked out once, and addresses are read once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import checks, native_calls

MOST_SELECTIONS = 256  # that are kept


class GradientColumns:
    """K parameters with a gradient for each of T tasks, in every update.

    The gradients are those of autograd, which have their leaf's shape, dtype and layout. So each leaf is checked once,
    and no gradient.

    Args:
        params: K tensors, all that an update may change.
        tasks: T.
        leaves: of one task, whose gradients they are [K]; the parameters themselves when left out.

    Raises:
        ValueError, TypeError: a leaf has a dtype that no gradient may have, or gaps in memory, or another device.
    """

    def __init__(self, params: Sequence[Tensor], tasks: int, leaves: Sequence[Tensor] | None = None) -> None:
        self.params, self.tasks = list(params), tasks
        self.leaves = self.params if leaves is None else list(leaves)
        checks.task_gradients("GradientColumns", [self.leaves])
        self.all = tuple(range(len(self.params)))
        self._selected: dict[tuple[int, ...], SelectedColumns] = {}

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device

    def select(self, numbers: Sequence[int]) -> SelectedColumns:
        """Some columns in an order of their own."""
        key = tuple(numbers)
        if key not in self._selected:
            if len(self._selected) == MOST_SELECTIONS:
                self._selected.clear()
            self._selected[key] = SelectedColumns(self, key)
        return self._selected[key]


class SelectedColumns:
    """Some of the columns, and what native code reads of them in every update.

    Attributes:
        sizes, dtypes: of each column, as native code reads them.
    """

    def __init__(self, columns: GradientColumns, numbers: tuple[int, ...]) -> None:
        leaves = [columns.leaves[k] for k in numbers]
        self.numbers, self.tasks = numbers, columns.tasks
        self.sizes = array("q", [leaf.numel() for leaf in leaves])
        self.dtypes = array("q", [native_calls.DTYPE_CODES[leaf.dtype] for leaf in leaves])
        places = [task * len(columns.params) + k for task in range(columns.tasks) for k in numbers]
        self._of = itemgetter(*places)
        self._single = len(places) == 1

    @cached_property
    def chunks(self) -> int:
        """The number of pieces in which native code reads dense gradients."""
        return native_calls.chunks(self.sizes)

    def of(self, values: Sequence[Any]) -> Sequence[Any]:
        """Of T K values those of these columns, task after task."""
        found = self._of(values)
        return (found,) if self._single else found


class GradientTable:
    """The gradients of one update.

    Args:
        columns: what is known of them.
        grads: T K, those of a task after those of the one before; None for a missing one. Those of a column are all
            dense, or, on CPUs, all sparse as for `gram`. The list does not change while the table is used.

    Attributes:
        present: the numbers of the columns that some task has a gradient of. A tensor without elements has none.

    Raises:
        ValueError: a sparse gradient is not as described.
    """

    def __init__(self, columns: GradientColumns, grads: Sequence[Tensor | None]) -> None:
        self.columns, self.grads = columns, grads
        self._row_numbers: list[Tensor | None] = []
        self._values: Sequence[Tensor | None] = grads  # of sparse gradients, the numbers of their rows
        try:
            self._addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
        except RuntimeError:  # torch's for a sparse gradient, which has no address
            self._read_sparse()
        self.present = columns.all if 0 not in self._addresses else self._present()
        self._selected: dict[SelectedColumns, array[int]] = {}

    @property
    def rows(self) -> list[list[Tensor | None]]:
        """For each task its K gradients."""
        count = len(self.columns.params)
        return [list(self.grads[task * count : (task + 1) * count]) for task in range(self.columns.tasks)]

    def present_params(self) -> list[Tensor]:
        """The parameters of the columns that are present."""
        return [self.columns.params[k] for k in self.present]

    def op_arguments(self, selected: SelectedColumns) -> tuple[list[Tensor | None], list[Tensor | None], list[int]]:
        """The gradients of some columns as the custom ops take them (`native_calls.sparse_parts`)."""
        return native_calls.sparse_parts(self.rows, selected.numbers)

    def arguments(self, selected: SelectedColumns, first_columns: Sequence[int] | None) -> tuple[Any, ...]:
        """csrc/gradient_parts.h's GradientArguments for some of the columns, each of which is `present`.

        Args:
            first_columns: as from `native_calls.by_part`; None for one part.
        """
        addresses = self._selected.get(selected)
        if addresses is None:
            addresses = self._selected[selected] = array("q", selected.of(self._addresses))
        sparse = self._sparse_arguments(selected) if self._row_numbers else ([], [], [])
        return addresses, selected.sizes, selected.dtypes, selected.tasks, *sparse, first_columns or []

    def sparse_rows(self, selected: SelectedColumns) -> int:
        """How many rows the sparse gradients of some columns have in all."""
        return sum(len(ids) for ids in selected.of(self._row_numbers) if ids is not None) if self._row_numbers else 0

    def _read_sparse(self) -> None:
        count, values = len(self.columns.params), list(self.grads)
        self._row_numbers = [None] * len(values)
        for i, grad in enumerate(self.grads):
            if grad is not None and grad.layout != torch.strided:
                checks.sparse_rows("GradientTable", f"grads[{i // count}][{i % count}]", grad)
                values[i], self._row_numbers[i] = grad.values().contiguous(), grad.indices()[0].contiguous()
        self._values = values
        self._addresses = [native_calls.address(value) for value in values]

    def _present(self) -> tuple[int, ...]:
        count = len(self.columns.params)
        sparse = self._row_numbers or [None] * len(self._addresses)  # one without rows has no address either
        there = [address != 0 or ids is not None for address, ids in zip(self._addresses, sparse, strict=True)]
        return tuple(k for k in range(count) if any(there[k::count]))

    def _sparse_arguments(self, selected: SelectedColumns) -> tuple[list[int], list[int], list[int]]:
        """The columns of sparse gradients (0 for dense ones), and their rows' numbers and how many these are."""
        ids, values, count = selected.of(self._row_numbers), selected.of(self._values), len(selected.numbers)
        widths = [
            next(
                (value.shape[1] for value, its in zip(values[k::count], ids[k::count], strict=True) if its is not None),
                0,
            )
            for k in range(count)
        ]
        return widths, [native_calls.address(its) for its in ids], [0 if its is None else len(its) for its in ids]
