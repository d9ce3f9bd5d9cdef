"""One training step: losses, backward, surgery, clipping and AdamW, for however many tasks, batches and updates.

Nothing here waits for a GPU: a step is handed over, and what it did is read later (`Pending`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from minbert import kernels
from minbert.data import Encoded, pack_batches
from minbert.data.packing import Packed
from minbert.distributed.batch_shards import shard_examples
from minbert.distributed.process_group import ProcessGroup
from minbert.distributed.sharded_parameters import ShardedParameters
from minbert.methods.surgery import Surgery
from minbert.methods.task_gradients import TaskGradients
from minbert.model import MultitaskModel
from minbert.seeds import derive_seed
from minbert.tasks import Task
from minbert.training.cuda_graphs import Replay
from minbert.training.host_device_copy import Readings, moved
from minbert.training.objective import Batch, Losses, Objective
from minbert.training.optimizer import AdamW
from minbert.training.step_result import Clock, Pending

Parts = Sequence[tuple[Task, np.ndarray]]  # tasks, and which of their examples


@dataclass
class Stepper:
    """What takes the steps of a run.

    Args:
        groups: tasks by the gradient they share: one group for each row of `gradients`, or a single row for all.
        surgeries: the updates of a step.
        accumulate: batches of each task in one update.
        low_memory: whether each group goes through the model alone, rather than all in one stream.
        clip_norm: gradients are scaled down to this norm; 0 leaves them.
        seed: what dropout, noise and the order of surgery follow.
        bucket_to: replay CUDA graphs, with batches in buckets of token counts; no sequence may be longer than this.
            None does neither.
        ranks: those that take each step together: every rank has a stretch of each stream, of about as many tokens.
        arena: where gradients, parameters and moments lie that the ranks share out; needed where there are several.
    """

    model: MultitaskModel
    objective: Objective
    optimizer: AdamW
    gradients: TaskGradients
    groups: Sequence[Sequence[Task]]
    surgeries: Sequence[Surgery]
    data: Mapping[str, Encoded]
    accumulate: int
    low_memory: bool
    clip_norm: float
    seed: int
    device: torch.device
    bucket_to: int | None = None
    group: ProcessGroup = field(default_factory=ProcessGroup)
    arena: ShardedParameters | None = None
    _replay: Replay | None = field(default=None, init=False)
    _unsettled: tuple[Readings, list[Tensor]] | None = field(default=None, init=False)  # the last update

    def __post_init__(self) -> None:
        if self.bucket_to is not None:
            leaves = [*self.gradients.leaves, *self.model.heads.parameters()]
            self._replay = Replay(partial(self._differentiate, row=None), leaves, self.device)

    def take(self, batches: Sequence[Parts], step: int, done: float) -> Pending:
        """Have the device update the model once, or as often as surgery says.

        Args:
            batches: `accumulate` of them.
            step: its number, from 0.
            done: share of all steps that are done.
        """
        clock, updates = Clock(self.device), list[Readings]()
        allowed = torch.ones((), dtype=torch.float64, device=self.device)
        for number, surgery in enumerate(self.surgeries):
            self.gradients.clear()
            self.optimizer.zero_grad(set_to_none=True)
            streams = [
                (row, parts, derive_seed(self.seed, "step", step, number, micro, stream))
                for micro, batch in enumerate(batches)
                for stream, (row, parts) in enumerate(self._streams(batch))
            ]
            found = []
            for left, (row, parts, seed) in zip(reversed(range(len(streams))), streams, strict=True):
                if self.arena is not None and not left:
                    self.arena.reduce_next_backward()
                found.append(self._backward(parts, row, seed, done, clock))
            allowed = self._update(found, surgery, derive_seed(self.seed, "surgery", step, number), allowed, updates)
            clock.lap("update")
        examples = sum(len(indices) for batch in batches for _, indices in batch)
        names = ["+".join(task.name for task in group) for group in self.groups] if self._split else []
        return Pending(updates, names, examples, clock, partial(self._settle, updates))

    def _streams(self, batch: Parts) -> list[tuple[int | None, Parts]]:
        """The streams in which a batch goes through the model, each with its only row of gradients; None for all."""
        if not self.low_memory:
            return [(None, batch)]
        groups = [[part for part in batch if part[0] in group] for group in self.groups]
        return [(row if self._split else 0, parts) for row, parts in enumerate(groups) if parts]

    @property
    def _split(self) -> bool:
        return len(self.gradients.rows) > 1

    def _backward(self, parts: Parts, row: int | None, seed: int, done: float, clock: Clock) -> Losses:
        """Add the gradients of one stream."""
        packed = self._packed(parts, row)
        labels = {task.name: torch.from_numpy(self.data[task.name].labels[i]) for task, i in parts}  # type: ignore[index]
        batch = self.objective.batch(packed, labels, seed=seed, done=done)
        clock.lap("batch")
        if self._replay is not None:
            losses = self._replay(batch)
        else:
            batch = batch.with_tensors(moved(batch.tensors, self.device))
            losses = self._differentiate(batch, row, clock.lap)
        clock.lap("backward")
        return losses

    def _packed(self, parts: Parts, row: int | None) -> Packed:
        """A stream, or this rank's stretch of it."""
        here, share = parts, None
        if self.arena is not None:
            lengths = [self.data[task.name].lengths[indices] for task, indices in parts]
            own, share = shard_examples(lengths, [self.data[task.name].width for task, _ in parts], self.group)
            here = [(task, i[of]) for (task, i), of in zip(parts, own, strict=True) if len(i[of])]
        packed = pack_batches([(self.data[task.name], indices) for task, indices in here], self.bucket_to)
        if row is None and self._split:
            packed = packed.by_task(self._sequences(here, packed.padding))
            if share is not None:
                share = replace(share, bounds=(0, *accumulate(self._sequences(parts))))
        return replace(packed, share=share)

    def _sequences(self, parts: Parts, padding: int = 0) -> list[int]:
        """Of each group in a stream."""
        sizes = {task.name: len(indices) * self.data[task.name].width + padding for task, indices in parts}
        return [sum(sizes.get(task.name, 0) for task in group) for group in self.groups]

    def _differentiate(
        self, batch: Batch, row: int | None, on_phase: Callable[[str], None] = lambda name: None
    ) -> Losses:
        losses = self.objective(batch, partial(self.gradients.attached, row), on_phase=on_phase)
        (losses.total / (self.accumulate * self.group.world_size)).backward()
        return losses

    def _update(
        self, found: Sequence[Losses], surgery: Surgery, seed: int, allowed: Tensor, updates: list[Readings]
    ) -> Tensor:
        """Surgery, clipping and AdamW; without a finite loss and gradient, or where it is not allowed, nothing changes.

        Returns:
            whether anything did, 1 or 0.
        """
        shared, own = self._gradients()
        rows = [list(row) for row in zip(*shared.values(), strict=True)] or [[] for _ in self.gradients.rows]
        sizes = [losses.perturbation for losses in found if losses.perturbation is not None]
        sums = torch.cat([self._gram(rows).flatten(), self._gram([own]).flatten(), *(size.view(1) for size in sizes)])
        squares, own_square, perturbations = self.group.all_reduce_sum(sums).split([len(rows) ** 2, 1, len(sizes)])
        gram = squares.view(len(rows), -1)
        total = torch.stack([losses.total for losses in found]).sum().double()
        own_square = own_square[0] + (total - total)  # a loss that is not finite marks the update so
        generator = torch.Generator().manual_seed(seed)
        weights, stats = surgery.weights(gram, generator, own_square, self.clip_norm, self._of_first_rank)
        updated = stats[2] * allowed
        self._settle()
        counted = self.optimizer.combined_step(shared, weights, stats[1:2], skip_unless=updated)
        if self.arena is not None:
            self.arena.all_gather()
            for param, copy in self.objective.copies.items():
                copy.copy_(param.detach())

        numbers: dict[Hashable, list[Tensor]] = defaultdict(list)
        for losses in found:
            for kind, by_task in (("loss", losses.task), ("smart", losses.smart), ("bregman", losses.bregman)):
                for name, value in by_task.items():
                    numbers[kind, name].append(value)
            numbers["smart"].append(losses.smart_term)
            numbers["total"].append(losses.total)
        if sizes:
            numbers["perturbation"] = list(perturbations)
        numbers |= {"gram": [gram], "stats": [stats], "updated": [updated]}
        updates.append(Readings({name: torch.stack(of) for name, of in numbers.items()}, self.group.liveness.wait_for))
        self._unsettled = updates[-1], counted
        return updated

    def _of_first_rank(self, weights: Tensor) -> Tensor:
        return self.group.all_reduce_sum(weights if self.group.is_main else torch.zeros_like(weights))

    def _gradients(self) -> tuple[Mapping[Tensor, Sequence[Tensor | None]], list[Tensor]]:
        """Of all streams and ranks: by parameter that the tasks share its gradient in each row, and all others."""
        if self.arena is not None:
            return self.arena.wait_for_gradients()
        own = [param.grad for param in self.model.heads.parameters() if param.grad is not None]
        return dict(zip(self.gradients.params, zip(*self.gradients.rows, strict=True), strict=True)), own

    def _gram(self, rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """On the device even where there is no gradient, as of a frozen encoder."""
        if any(grad is not None for row in rows for grad in row):
            return kernels.gram(rows)
        return torch.zeros(len(rows), len(rows), dtype=torch.float64, device=self.device)

    def _settle(self, updates: Sequence[Readings] | None = None) -> None:
        """Have the optimizer forget the last update (if it is one of `updates`) when it changed nothing.

        On a GPU this waits for that update. Before the next one, the backward in between is under way by then.
        """
        if self._unsettled is not None and (updates is None or self._unsettled[0] in updates):
            readings, counted = self._unsettled
            self._unsettled = None
            if not readings.read()["updated"][0]:
                self.optimizer.uncount(counted)
