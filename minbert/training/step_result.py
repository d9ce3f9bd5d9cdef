"""What a training step did, read from the device when it is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import torch

from minbert.methods.surgery import Conflicts
from minbert.training.host_device_copy import Readings


class Clock:
    """Seconds by phase, as the device spends them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [("", self._now())]

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was spent on `phase`."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """The laps of each phase together; of a GPU that is done with them."""
        total: dict[str, float] = {}
        for (_, start), (phase, end) in pairwise(self._marks):
            took = start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
            total[phase] = total.get(phase, 0.0) + took
        return total

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


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
    examples: int
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
class Pending:
    """A step that the device has been given.

    Args:
        updates: the readings of each of its updates: "gram" of the rows of gradients, "stats" of the weights
            (`kernels.surgery_weights`), "updated", and one number for each stream: (loss, smart or bregman, task),
            "total", "smart", "perturbation".
        groups: names of the rows of gradients, where there are several.
        settle: is called before what the step did is told.
    """

    updates: Sequence[Readings]
    groups: Sequence[str]
    examples: int
    clock: Clock
    settle: Callable[[], None]

    def taken(self) -> Taken:
        """What the step did; waits for it."""
        self.settle()
        first, *_ = updates = [update.read() for update in self.updates]
        by_task = {
            kind: {key[1]: _mean(values) for key, values in first.items() if isinstance(key, tuple) and key[0] == kind}
            for kind in ("loss", "smart", "bregman")
        }
        norm, *_, share = first["stats"]
        gram = torch.tensor(first["gram"], dtype=torch.float64).view(len(self.groups) or 1, -1)
        conflicts = Conflicts.of(gram, share) if self.groups else None
        return Taken(
            **by_task,
            smart_share=sum(first["smart"]) / (sum(first["total"]) or math.nan),
            perturbation=_mean(first.get("perturbation", [0.0])),
            grad_norm=norm,
            conflicts=self._by_pair(conflicts) if conflicts else {},
            projected_share=conflicts.projected_share if conflicts else 0.0,
            updated=all(update["updated"][0] for update in updates),
            examples=self.examples,
            seconds=self.clock.seconds(),
        )

    def _by_pair(self, conflicts: Conflicts) -> dict[str, dict[str, float]]:
        pairs = list(combinations(range(len(self.groups)), 2))
        measures = {"cosine": conflicts.cosine, "magnitude_similarity": conflicts.magnitude_similarity}
        return {
            measure: {f"{self.groups[i]}/{self.groups[j]}": values[i, j].item() for i, j in pairs}
            for measure, values in measures.items()
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
