"""Parameters that step together, as sets with one step count each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minbert.kernels.gradient_table import GradientColumns
from minbert.kernels.prepared_adamw import AdamWTensors

MOST_KEYS = 256

State = MutableMapping[Tensor, dict[str, Any]]


class ParameterSet:
    """Parameters of one group that have made the same steps.

    Attributes:
        step: how many, float32 []: the entry of that name in the state of each of them.
    """

    def __init__(self, group: Mapping[str, Any], params: Sequence[Tensor], step: Tensor, entry: str) -> None:
        self.group, self.params, self.step, self.entry = group, params, step, entry
        self._tensors: AdamWTensors | None = None

    def count(self) -> int:
        """Count a step; its number, from 1."""
        return int(self.step.add_(1))

    def prepare(self, tensors: AdamWTensors, columns: GradientColumns, parts: Mapping[Tensor, int] | None) -> None:
        """Keep what `combine_adamw_of_` changes where gradients are in these columns, and parts have these numbers."""
        self._tensors, self._columns, self._parts = tensors, columns, parts

    def prepared(self, columns: GradientColumns, parts: Mapping[Tensor, int] | None) -> AdamWTensors | None:
        """What was kept, if it is still right."""
        tensors = self._tensors
        right = tensors is not None and self._columns is columns and self._parts is parts and tensors.are_in_place()
        return tensors if right else None


class ParameterSets:
    """Divides parameters into sets, and these again where only some of a set step. It never joins sets.

    Args:
        groups, state: the optimizer's.
        entry: the state's name for step counts.
        start: makes the rest of a parameter's state, at its first step.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], state: State, entry: str, start: Callable[[Tensor], None]
    ) -> None:
        self._groups, self._state, self._entry, self._start = groups, state, entry, start
        self._sets: list[ParameterSet] = []
        self._known: dict[Hashable, list[ParameterSet]] = {}

    def of(self, key: Hashable, params: Callable[[], Iterable[Tensor]]) -> list[ParameterSet]:
        """The sets that some parameters are, those of no group left out; `key` stands for these parameters."""
        if key not in self._known:
            if len(self._known) == MOST_KEYS:
                self._known.clear()
            wanted = set(params())
            self._divide(wanted)
            self._add(wanted)
            self._known[key] = [each for each in self._sets if each.params[0] in wanted]
        return self._known[key]

    def _divide(self, wanted: set[Tensor]) -> None:
        for each in list(self._sets):
            inside = [param for param in each.params if param in wanted]
            if 0 < len(inside) < len(each.params):
                outside = [param for param in each.params if param not in wanted]
                self._sets.remove(each)
                self._sets += [self._made(each.group, part, float(each.step)) for part in (inside, outside)]
                self._known.clear()

    def _add(self, wanted: set[Tensor]) -> None:
        known = {param for each in self._sets for param in each.params}
        for group in self._groups:
            by_step: dict[float, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param in wanted and param not in known:
                    if self._entry not in self._state[param]:
                        self._start(param)
                    by_step[float(self._state[param].get(self._entry, 0))].append(param)
            self._sets += [self._made(group, params, step) for step, params in by_step.items()]

    def _made(self, group: Mapping[str, Any], params: Sequence[Tensor], step: float) -> ParameterSet:
        count = torch.tensor(step, dtype=torch.float32)
        for param in params:
            self._state[param][self._entry] = count
        return ParameterSet(group, params, count, self._entry)
