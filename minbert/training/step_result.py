"""The results of a training step, read from the device when they are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from minbert.methods.surgery import Conflicts
from minbert.training.host_device_copy import Readback
from minbert.training.optimizer import AdamW
from minbert.training.parameter_sets import ParameterSet


class PhaseTimer:
    """Seconds by phase, on the device's clock.

    Args:
        wait: waits for a CUDA event.
    """

    def __init__(self, device: torch.device, wait: Callable[[Any], None] = torch.cuda.Event.synchronize) -> None:
        self._device, self._wait = device, wait
        self._marks = [("", self._now())]

    def end(self, phase: str) -> None:
        """End a phase, which began when the last one ended."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """The seconds of each phase in all; waits for the last mark, which a GPU reaches after all others."""
        total: dict[str, float] = {}
        if self._device.type == "cuda":
            self._wait(self._marks[-1][1])
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
class StepResult:
    """What a step did. Losses are means over its batches, of its first update."""

    loss: dict[str, float]
    smart: dict[str, float]
    rdrop: dict[str, float]
    bregman: dict[str, float]
    smart_share: float  # of the whole loss; 0 without SMART
    perturbation: float  # mean over tokens of its infinity norm
    grad_norm: float  # of all gradients after surgery, before clipping
    conflicts: dict[str, dict[str, float]]  # measure -> pair of tasks -> value; empty for one gradient
    projected_share: float
    weights: dict[str, float]  # of the task gradients, before clipping; empty for one gradient, and for constant ones
    updated: bool  # whether loss and gradient were finite; if not, nothing has changed
    examples: int
    seconds: dict[str, float] = field(default_factory=dict)  # by phase

    def record(self) -> dict[str, Any]:
        """The step's part of its line in metrics.jsonl."""
        kept: dict[str, Any] = {"loss": self.loss, "grad_norm": self.grad_norm}
        if self.smart:
            kept |= {"smart": self.smart, "smart_share": self.smart_share, "perturbation": self.perturbation}
        if self.rdrop:
            kept["rdrop"] = self.rdrop
        if self.bregman:
            kept["bregman"] = self.bregman
        if self.conflicts:
            kept |= {**self.conflicts, "projected_share": self.projected_share}
        if self.weights:
            kept["weights"] = self.weights
        return {**kept, "seconds": self.seconds}


class PendingUpdate:
    """An update that the device has been given, whose numbers are on their way to the host.

    Args:
        numbers: "gram" of the task gradients, "weights" and "stats" of `kernels.surgery_weights`, "updated" (1, or 0
            where a loss or gradient is not finite and nothing changes), and one number for each stream: (loss, smart,
            rdrop or bregman, task), "total", "smart", "perturbation".
        optimizer, counted: the optimizer, and the parameters whose step counts it has added one to.
        wait: waits for a CUDA event.
    """

    def __init__(
        self,
        numbers: Mapping[Hashable, Sequence[Tensor]],
        optimizer: AdamW,
        counted: Sequence[ParameterSet],
        wait: Callable[[Any], None] = torch.cuda.Event.synchronize,
    ) -> None:
        self._readback, self._optimizer, self._counted = Readback(numbers, wait), optimizer, counted
        self._numbers: dict[Hashable, list[float]] | None = None

    def result(self) -> dict[Hashable, list[float]]:
        """The numbers, each flat; waits for them. An update that changed nothing is uncounted by the optimizer."""
        if self._numbers is None:
            self._numbers = self._readback.read()
            if not self._numbers["updated"][0]:
                self._optimizer.uncount(self._counted)
        return self._numbers


@dataclass(frozen=True)
class PendingStep:
    """A step that the device has been given.

    Args:
        updates: one, or as many as the surgery takes.
        names: of the rows of task gradients, where there are several.
        weighs: whether the first update's weights are worth a record: not those of the plain sum or mean.
    """

    updates: Sequence[PendingUpdate]
    names: Sequence[str]
    examples: int
    timer: PhaseTimer
    weighs: bool = False

    def result(self) -> StepResult:
        """What the step did; waits for it."""
        first, *_ = updates = [update.result() for update in self.updates]
        by_task = {
            kind: {key[1]: _mean(values) for key, values in first.items() if isinstance(key, tuple) and key[0] == kind}
            for kind in ("loss", "smart", "rdrop", "bregman")
        }
        norm, scale, _, share = first["stats"]
        gram = torch.tensor(first["gram"], dtype=torch.float64).view(len(self.names) or 1, -1)
        conflicts = Conflicts.of(gram, share) if self.names else None
        return StepResult(
            **by_task,
            smart_share=sum(first["smart"]) / total if (total := sum(first["total"])) else 0.0,
            perturbation=_mean(first.get("perturbation", [0.0])),
            grad_norm=norm,
            conflicts=self._by_pair(conflicts) if conflicts else {},
            projected_share=conflicts.projected_share if conflicts else 0.0,
            weights=self._by_name(first["weights"], scale) if self.weighs else {},
            updated=all(update["updated"][0] for update in updates),
            examples=self.examples,
            seconds=self.timer.seconds(),
        )

    def _by_name(self, weights: Sequence[float], scale: float) -> dict[str, float]:
        """The weights before clipping; of several parts of the model, their means."""
        return {name: _mean(weights[row :: len(self.names)]) / scale for row, name in enumerate(self.names)}

    def _by_pair(self, conflicts: Conflicts) -> dict[str, dict[str, float]]:
        pairs = list(combinations(range(len(self.names)), 2))
        measures = {"cosine": conflicts.cosine, "magnitude_similarity": conflicts.magnitude_similarity}
        return {
            measure: {f"{self.names[i]}/{self.names[j]}": values[i, j].item() for i, j in pairs}
            for measure, values in measures.items()
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
