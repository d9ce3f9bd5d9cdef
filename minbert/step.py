"""One training step: losses, backward, surgery, clipping and AdamW, for however many tasks, batches and updates."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert import kernels
from minbert.data import Encoded, pack_batches
from minbert.gradients import TaskGradients
from minbert.model import MultitaskModel
from minbert.objective import Batch, Losses, Objective
from minbert.optimizer import AdamW
from minbert.seeds import derive_seed
from minbert.surgery import Conflicts, Surgery
from minbert.tasks import Task

Parts = Sequence[tuple[Task, np.ndarray]]  # tasks, and which of their examples


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was spent on `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


@dataclass(frozen=True)
class Taken:
    """What a step did. Losses are means over its batches, of its first update."""

    loss: dict[str, float]
    smart: dict[str, float]
    bregman: dict[str, float]
    smart_share: float  # of the whole loss; 0 without SMART
    perturbation: float  # mean over tokens of its infinity norm
    grad_norm: float  # of all gradients after surgery, before clipping
    conflicts: dict[str, dict[str, float]]  # measure -> pair of tasks -> value; empty for one gradient
    projected_share: float
    updated: bool  # whether loss and gradient were finite; if not, nothing has changed
    examples: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase

    def record(self) -> dict[str, Any]:
        """What metrics.jsonl says of it."""
        kept: dict[str, Any] = {"loss": self.loss, "grad_norm": self.grad_norm}
        if self.smart:
            kept |= {"smart": self.smart, "smart_share": self.smart_share, "perturbation": self.perturbation}
        if self.bregman:
            kept["bregman"] = self.bregman
        if self.conflicts:
            kept |= {**self.conflicts, "projected_share": self.projected_share}
        return {**kept, "seconds": self.seconds}


@dataclass(frozen=True)
class Stepper:
    """What takes the steps of a run.

    Args:
        groups: tasks by the gradient they share: one group for each row of `gradients`, or a single row for all.
        surgeries: the updates of a step.
        accumulate: batches of each task in one update.
        low_memory: whether each group goes through the model alone, rather than all in one stream.
        clip_norm: gradients are scaled down to this norm; 0 leaves them.
        seed: what dropout, noise and the order of surgery follow.
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

    def take(self, batches: Sequence[Parts], step: int, done: float) -> Taken:
        """Update the model once, or as often as surgery says.

        Args:
            batches: `accumulate` of them.
            step: its number, from 0.
            done: share of all steps that are done.
        """
        clock, updates = Clock(), []
        for number, surgery in enumerate(self.surgeries):
            self.gradients.clear()
            self.optimizer.zero_grad(set_to_none=True)
            found = [
                self._backward(parts, row, derive_seed(self.seed, "step", step, number, micro, stream), done, clock)
                for micro, batch in enumerate(batches)
                for stream, (row, parts) in enumerate(self._streams(batch))
            ]
            updates.append(self._update(found, surgery, derive_seed(self.seed, "surgery", step, number)))
            clock.lap("update")
        examples = sum(len(indices) for batch in batches for _, indices in batch)
        updated = all(update.updated for update in updates)
        return replace(updates[0], updated=updated, examples=examples, seconds=clock.seconds)

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
        packed = pack_batches([(self.data[task.name], indices) for task, indices in parts])
        if row is None and self._split:
            names = [{task.name for task in group} for group in self.groups]
            packed = packed.by_task([sum(len(i) for task, i in parts if task.name in group) for group in names])
        labels = {
            task.name: torch.from_numpy(self.data[task.name].labels[indices]).to(self.device)  # type: ignore[index]
            for task, indices in parts
        }
        clock.lap("batch")
        losses = self.objective(
            Batch(packed.to(self.device), labels),
            functools.partial(self.gradients.attached, row),
            seed=seed,
            done=done,
            on_phase=clock.lap,
        )
        (losses.total / self.accumulate).backward()
        clock.lap("backward")
        return losses

    def _update(self, found: Sequence[Losses], surgery: Surgery, seed: int) -> Taken:
        """Surgery, clipping and AdamW; without a finite loss and gradient, nothing changes."""
        rows = self.gradients.rows
        gram = kernels.gram(rows)
        weights = surgery.weights(gram, torch.Generator().manual_seed(seed))
        own = [param.grad for param in self.model.heads.parameters() if param.grad is not None]
        squares = (weights @ gram @ weights).clamp(min=0) + sum(grad.double().square().sum() for grad in own)
        norm = squares.sqrt().item()
        total = sum(losses.total.item() for losses in found) / self.accumulate
        updated = math.isfinite(norm) and math.isfinite(total)
        if updated:
            scale = self.clip_norm / norm if 0 < self.clip_norm < norm else 1.0
            shared: dict[Tensor, Sequence[Tensor | None]]
            shared = dict(zip(self.gradients.params, zip(*rows, strict=True), strict=True))
            self.optimizer.combined_step(shared, weights * scale, scale)
        conflicts = Conflicts.of(gram, weights, surgery.plain(gram)) if self._split else None
        sizes = [losses.perturbation.item() for losses in found if losses.perturbation is not None]
        return Taken(
            loss=_means([losses.task for losses in found]),
            smart=_means([losses.smart for losses in found]),
            bregman=_means([losses.bregman for losses in found]),
            smart_share=sum(losses.smart_term.item() for losses in found) / self.accumulate / (total or math.nan),
            perturbation=sum(sizes) / max(len(sizes), 1),
            grad_norm=norm,
            conflicts=self._by_pair(conflicts) if conflicts else {},
            projected_share=conflicts.projected_share if conflicts else 0.0,
            updated=updated,
        )

    def _by_pair(self, conflicts: Conflicts) -> dict[str, dict[str, float]]:
        names = ["+".join(task.name for task in group) for group in self.groups]
        pairs = list(combinations(range(len(names)), 2))
        measures = {"cosine": conflicts.cosine, "magnitude_similarity": conflicts.magnitude_similarity}
        return {
            measure: {f"{names[i]}/{names[j]}": values[i, j].item() for i, j in pairs}
            for measure, values in measures.items()
        }


def _means(found: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """By task, the mean over the streams it was in."""
    values: dict[str, list[float]] = {}
    for losses in found:
        for name, loss in losses.items():
            values.setdefault(name, []).append(loss.item())
    return {name: sum(each) / len(each) for name, each in values.items()}
