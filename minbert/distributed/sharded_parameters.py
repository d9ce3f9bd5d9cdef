"""Gradients, parameters and optimizer state of which every rank keeps a part.

Parameters lie in buckets, flat tensors filled in the order in which a backward is done with them. Of every bucket a
rank owns one of `size` equal parts: it gets the sum of all ranks' gradients there (a reduce-scatter for each row of
them, which starts as soon as the backward has the whole row), updates the parameters there and keeps their moments;
then all ranks gather the parameters. What lies of a parameter in a rank's part is a piece, and the optimizer is given
pieces (Rajbhandari et al. 2020, ZeRO, stage 2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minbert.distributed.process_group import ProcessGroup, Sent
from minbert.methods.task_gradients import TaskGradients

BUCKET = 8 << 20  # elements: 32 MiB of float32
ALIGNMENT = 16  # elements: where a parameter begins, kernels read quickly
IN_FLIGHT = 4  # rows of gradients that are sent at once, each in memory of its own


OptimizerState = Mapping[Tensor, Mapping[str, Tensor]]  # by parameter


class Piece(NamedTuple):
    """What lies of a parameter in the part of a bucket that this rank owns."""

    param: Tensor
    begin: int  # of the piece, among the parameter's elements
    values: Tensor  # flat
    at: slice  # of the part


class Bucket:
    """Parameters in one flat tensor, `whole`."""

    def __init__(self, params: Sequence[Tensor], rows: int, group: ProcessGroup) -> None:
        self.params, self.rows = params, rows
        self.starts, end = [], 0
        for param in params:
            self.starts.append(end)
            end += -(-param.numel() // ALIGNMENT) * ALIGNMENT
        part = -(-end // (group.world_size * ALIGNMENT)) * ALIGNMENT
        self.whole = params[0].new_zeros(group.world_size * part)
        self.pieces = []
        own = group.part(self.whole)
        for param, start, place in zip(params, self.starts, self.views(self.whole), strict=True):
            place.copy_(param.detach())
            param.data = place
            low = max(0, start - group.rank * part)
            high = min(part, start + param.numel() - group.rank * part)
            if low < high:
                begin = group.rank * part + low - start
                self.pieces.append(Piece(param, begin, own[low:high].detach(), slice(low, high)))

    def views(self, whole: Tensor) -> list[Tensor]:
        """The parameters' places in a tensor like the bucket's own."""
        places = zip(self.params, self.starts, strict=True)
        return [whole[start : start + param.numel()].view(param.shape) for param, start in places]


class ShardedParameters:
    """The trainable parameters of a model, in buckets.

    Args:
        own: those with one gradient, their `.grad`.
        shared: those with `rows` of gradients, which `watch` names.
    """

    def __init__(self, own: Sequence[Tensor], shared: Sequence[Tensor], rows: int, group: ProcessGroup) -> None:
        self.group = group
        self.buckets = [Bucket(params, 1, group) for params in _by_bucket(own)]
        self.buckets += [Bucket(params, rows, group) for params in _by_bucket(list(reversed(shared)))]
        self.averages: dict[Tensor, Tensor] = {}
        self._averaged: list[Tensor] = []
        self._shared = set(shared)
        self._units: list[_Row] = []
        self._armed = False

    @property
    def pieces(self) -> list[Piece]:
        return [piece for bucket in self.buckets for piece in bucket.pieces]

    def groups(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """An optimizer's groups of parameters, as groups of pieces; some may be empty."""
        by_param: dict[Tensor, list[Tensor]] = {}
        for piece in self.pieces:
            by_param.setdefault(piece.param, []).append(piece.values)
        return [
            {**group, "params": [values for param in group["params"] for values in by_param.get(param, ())]}
            for group in groups
        ]

    # Gradients ---------------------------------------------------------------------------------------------------

    def watch(self, gradients: TaskGradients) -> None:
        """Send rows once a backward has filled them: those of `gradients`, and the `.grad` of all other parameters."""
        places: dict[Tensor, int] = {param: i for i, param in enumerate(gradients.params)}
        per_row = len(gradients.params)
        for bucket in self.buckets:
            for row in range(bucket.rows):
                leaves = [
                    gradients.leaves[row * per_row + places[param]] if param in places else param
                    for param in bucket.params
                ]
                unit = _Row(bucket, leaves)
                for leaf in leaves:
                    leaf.register_post_accumulate_grad_hook(partial(self._arrived, unit))
                self._units.append(unit)

    def expect(self) -> None:
        """The next backward is the last before `reduced`."""
        self._armed = True
        for unit in self._units:
            unit.missing = len(unit.leaves)
        self._waiting, self._under_way = deque(self._units), deque[Sent]()

    def reduced(self) -> tuple[dict[Tensor, list[Tensor | None]], list[Tensor]]:
        """The sums over the ranks of what lies in this rank's parts, once they are there.

        A parameter that no loss reached on this rank is one that none reached on any: all compute the same losses.

        Returns:
            by piece of the shared parameters its gradient in each row, None where no loss reached it; and all gradients
            of other pieces, which are their `.grad` too.
        """
        while self._waiting:
            self._send(self._waiting.popleft())
        while self._under_way:
            self._under_way.popleft().wait()
        self._armed = False
        shared: dict[Tensor, list[Tensor | None]] = {}
        own = []
        for unit in self._units:
            for piece in unit.bucket.pieces:
                grad = unit.part[piece.at] if piece.param in unit.reached else None
                if piece.param in self._shared:
                    shared.setdefault(piece.values, []).append(grad)
                else:
                    piece.values.grad = grad
                    own += [] if grad is None else [grad]
        return shared, own

    def _arrived(self, unit: _Row, leaf: Tensor) -> None:
        if self._armed:
            unit.missing -= 1
            while self._waiting and self._waiting[0].missing == 0:  # in this order on all ranks
                self._send(self._waiting.popleft())

    @torch.no_grad()
    def _send(self, unit: _Row) -> None:
        if len(self._under_way) == IN_FLIGHT:
            self._under_way.popleft().wait()
        bucket = unit.bucket
        whole = torch.empty_like(bucket.whole)
        unit.reached = set()
        for param, leaf, place in zip(bucket.params, unit.leaves, bucket.views(whole), strict=True):
            if leaf.grad is None:
                place.zero_()
                continue
            unit.reached.add(param)
            place.copy_(leaf.grad)
            leaf.grad = None
        unit.part = torch.empty_like(self.group.part(whole))
        self._under_way.append(self.group.reduce_scatter(unit.part, whole))

    # Parameters --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gather(self) -> None:
        """Give all ranks what each has updated: the parameters, and their averages where an optimizer keeps some."""
        wholes = [bucket.whole for bucket in self.buckets] + self._averaged
        for sent in [self.group.all_gather(whole) for whole in wholes]:
            sent.wait()

    def keep_averages(self, optimizer: torch.optim.Optimizer) -> None:
        """Have all ranks keep the averages of an optimizer of pieces, in `averages`."""
        for bucket in self.buckets:
            averaged = bucket.whole.clone()
            self._averaged.append(averaged)
            self.averages |= dict(zip(bucket.params, bucket.views(averaged), strict=True))
            for piece in bucket.pieces:
                optimizer.state[piece.values]["average"] = self.group.part(averaged)[piece.at]

    def bytes_sent(self, *, averages: bool) -> int:
        """What this rank sends in an update, all but some numbers: every row of gradients, and what `gather` gathers.

        With P parameters that the tasks share, H others and T rows: 4 (T P + P + 2 H) (size - 1) / size, and 4 (P + H)
        (size - 1) / size for averages; P and H are rounded up to whole parts.
        """
        gathers = 2 if averages else 1
        whole = sum((bucket.rows + gathers) * bucket.whole.nbytes for bucket in self.buckets)
        return whole * (self.group.world_size - 1) // self.group.world_size

    # Optimizer state ---------------------------------------------------------------------------------------------

    def whole_state(self, state: OptimizerState) -> dict[Tensor, dict[str, Tensor]]:
        """The optimizer's state by parameter, of all ranks' pieces."""
        found: dict[Tensor, dict[str, Tensor]] = {}
        for bucket in self.buckets:
            numbers = {param: i for i, param in enumerate(bucket.params)}
            own = {
                (numbers[piece.param], name): value
                for piece in bucket.pieces
                for name, value in state.get(piece.values, {}).items()
            }
            scalars: dict[tuple[int, str], float | None] = {}
            for told in self.group.all_gather_object(
                {key: None if value.ndim else float(value) for key, value in own.items()}
            ):
                scalars |= told
            for name in sorted({name for _, name in scalars}):
                if any(number is None for key, number in scalars.items() if key[1] == name):
                    whole = torch.zeros_like(bucket.whole)
                    for piece in bucket.pieces:
                        value = own.get((numbers[piece.param], name))
                        if value is not None:
                            self.group.part(whole)[piece.at] = value
                    self.group.all_gather(whole).wait()
                    values: Sequence[Tensor] = bucket.views(whole)
                else:
                    values = [torch.tensor(scalars.get((i, name)) or 0.0) for i in range(len(bucket.params))]
                for i, (param, value) in enumerate(zip(bucket.params, values, strict=True)):
                    if (i, name) in scalars:
                        found.setdefault(param, {})[name] = value
        return found

    def own_state(self, whole: OptimizerState) -> dict[Tensor, dict[str, Tensor]]:
        """What lies in this rank's parts of an optimizer's whole state, by piece."""

        def stretch(value: Tensor, piece: Piece) -> Tensor:
            return value.reshape(-1)[piece.begin : piece.begin + len(piece.values)] if value.ndim else value

        return {
            piece.values: {name: stretch(value, piece) for name, value in whole.get(piece.param, {}).items()}
            for piece in self.pieces
        }


class _Row:
    """One row of a bucket's gradients."""

    def __init__(self, bucket: Bucket, leaves: Sequence[Tensor]) -> None:
        self.bucket, self.leaves = bucket, leaves
        self.missing = 0  # leaves that the backward has not filled yet
        self.reached: set[Tensor] = set()
        self.part: Tensor  # this rank's, of the sum


def _by_bucket(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters in their order, as many together as a bucket holds, at least one."""
    found: list[list[Tensor]] = []
    room = 0
    for param in params:
        if param.numel() > room:
            found.append([])
            room = BUCKET
        found[-1].append(param)
        room -= param.numel()
    return found
