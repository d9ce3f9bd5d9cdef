"""One training step: losses, backward, surgery, clipping and AdamW, for however many tasks, batches and updates.

Nothing here waits for a GPU: a step is handed over, and what it did is read later (`Pending`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minbert import kernels
from minbert.data import Encoded, pack_batches
from minbert.gradients import TaskGradients
from minbert.model import MultitaskModel
from minbert.objective import Batch, Losses, Objective
from minbert.optimizer import AdamW
from minbert.pending import Clock, Pending
from minbert.replay import Replay
from minbert.seeds import derive_seed
from minbert.surgery import Surgery
from minbert.tasks import Task
from minbert.transfer import Readings, moved

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
            found = [
                self._backward(parts, row, derive_seed(self.seed, "step", step, number, micro, stream), done, clock)
                for micro, batch in enumerate(batches)
                for stream, (row, parts) in enumerate(self._streams(batch))
            ]
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
        packed = pack_batches([(self.data[task.name], indices) for task, indices in parts], self.bucket_to)
        if row is None and self._split:
            names = [{task.name for task in group} for group in self.groups]
            sizes = {task.name: len(i) * self.data[task.name].width + packed.padding for task, i in parts}
            packed = packed.by_task([sum(sizes.get(name, 0) for name in group) for group in names])
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

    def _differentiate(
        self, batch: Batch, row: int | None, on_phase: Callable[[str], None] = lambda name: None
    ) -> Losses:
        losses = self.objective(batch, partial(self.gradients.attached, row), on_phase=on_phase)
        (losses.total / self.accumulate).backward()
        return losses

    def _update(
        self, found: Sequence[Losses], surgery: Surgery, seed: int, allowed: Tensor, updates: list[Readings]
    ) -> Tensor:
        """Surgery, clipping and AdamW; without a finite loss and gradient, or where it is not allowed, nothing changes.

        Returns:
            whether anything did, 1 or 0.
        """
        rows = self.gradients.rows
        own = [param.grad for param in self.model.heads.parameters() if param.grad is not None]
        gram = self._gram(rows)
        total = torch.stack([losses.total for losses in found]).sum().double()
        own_square = self._gram([own])[0, 0] + (total - total)  # a loss that is not finite marks the update so
        generator = torch.Generator().manual_seed(seed)
        weights, stats = surgery.weights(gram, generator, own_square, self.clip_norm)
        updated = stats[2] * allowed
        self._settle()
        shared: dict[Tensor, Sequence[Tensor | None]]
        shared = dict(zip(self.gradients.params, zip(*rows, strict=True), strict=True))
        counted = self.optimizer.combined_step(shared, weights, stats[1:2], skip_unless=updated)

        numbers: dict[Hashable, list[Tensor]] = defaultdict(list)
        for losses in found:
            for kind, by_task in (("loss", losses.task), ("smart", losses.smart), ("bregman", losses.bregman)):
                for name, value in by_task.items():
                    numbers[kind, name].append(value)
            numbers["smart"].append(losses.smart_term)
            numbers["total"].append(losses.total)
            if losses.perturbation is not None:
                numbers["perturbation"].append(losses.perturbation)
        numbers |= {"gram": [gram], "stats": [stats], "updated": [updated]}
        updates.append(Readings({name: torch.stack(of) for name, of in numbers.items()}))
        self._unsettled = updates[-1], counted
        return updated

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
