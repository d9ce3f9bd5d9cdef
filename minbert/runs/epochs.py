"""The epochs of a run, from the records of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """An epoch that was scored on the dev split."""

    epoch: int  # from 1
    step: int  # steps of the run by its end
    losses: Mapping[str, float]  # mean training loss of each task
    metrics: Mapping[str, Mapping[str, float]]  # dev scores of each task by metric
    overall: float
    conflict_rate: Mapping[str, float]  # by pair of tasks: share of the steps in which their gradients conflicted

    @property
    def scores(self) -> dict[str, float]:
        """Each task's first metric."""
        return {task: next(iter(scores.values())) for task, scores in self.metrics.items()}


def epochs(records: Iterable[Mapping[str, Any]]) -> list[Epoch]:
    """The epochs that ended, in order; of one in whose middle the run once ended, the better scores."""
    found: dict[int, Epoch] = {}
    for record in records:
        if "dev" in record:
            epoch = Epoch(
                record["epoch"],
                record["step"],
                record["train_loss"],
                {task: scores for task, scores in record["dev"].items() if task != "overall"},
                record["dev"]["overall"],
                record.get("conflict_rate", {}),
            )
            before = found.setdefault(epoch.epoch, epoch)
            found[epoch.epoch] = max(before, epoch, key=lambda each: each.overall)
    return list(found.values())
