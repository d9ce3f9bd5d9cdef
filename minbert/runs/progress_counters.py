"""Where a run stands: progress.json of a checkpoint, with the sums of the epoch at hand and the dev scores so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from minbert.errors import UserError
from minbert.files.json_yaml import read_json
from minbert.files.schema_checks import FORMAT, build, without_format
from minbert.runs.scores import Scores, check_scores
from minbert.tasks import Task
from minbert.tasks.metrics import overall


@dataclass
class EpochSums:
    """Sums over the steps of an epoch, without skipped ones."""

    loss_sums: dict[str, float] = field(default_factory=dict)  # by task
    loss_counts: dict[str, int] = field(default_factory=dict)  # steps with a batch of the task
    smart_shares: float = 0.0  # SMART's shares of the loss
    conflicts: dict[str, list[int]] = field(default_factory=dict)  # by pair of tasks: steps with a conflict, and steps

    def add(self, losses: Mapping[str, float], smart_share: float, cosines: Mapping[str, float]) -> None:
        """Add a step: losses by task, SMART's share of them, and cosines by pair of tasks."""
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + value
            self.loss_counts[name] = self.loss_counts.get(name, 0) + 1
        self.smart_shares += smart_share
        for pair, cosine in cosines.items():
            conflicts, steps = self.conflicts.get(pair, (0, 0))
            self.conflicts[pair] = [conflicts + (cosine < 0), steps + 1]

    def mean_losses(self) -> dict[str, float]:
        return {name: total / self.loss_counts[name] for name, total in self.loss_sums.items()}

    def conflict_rates(self) -> dict[str, float]:
        """By pair of tasks, the share of steps in which their gradients conflicted."""
        return {pair: conflicts / steps for pair, (conflicts, steps) in self.conflicts.items()}


@dataclass
class DevScores:
    """The dev scores of the epochs that have ended, and which epoch is best."""

    dev: list[Scores] = field(default_factory=list)
    best_epoch: int = 0
    best_overall: float = -1.0

    def add(self, epoch: int, scores: Scores, tasks: Sequence[Task]) -> bool:
        """Add an epoch's scores unless it has better ones; whether they are the best so far."""
        total = overall(scores, tasks)
        if len(self.dev) < epoch:
            self.dev.append(scores)
        elif total >= overall(self.dev[epoch - 1], tasks):
            self.dev[epoch - 1] = scores
        if total <= self.best_overall:
            return False
        self.best_epoch, self.best_overall = epoch, total
        return True

    @property
    def epochs_since_best(self) -> int:
        """Epochs scored after the best one."""
        return len(self.dev) - self.best_epoch


@dataclass
class Progress:
    """Where a run stands. With the seed it is the whole state of the random numbers: they are functions of the step."""

    step: int = 0  # optimizer steps so far, skipped ones included
    examples: int = 0
    seconds: float = 0.0  # spent in training steps
    skipped: int = 0  # steps skipped for a non-finite loss or gradient, and how many of them were the last ones
    skipped_in_a_row: int = 0
    smart_warned: bool = False  # whether the user knows that SMART does nothing
    data: dict[str, int | str] = field(default_factory=dict)  # checksums of each task's data; up to 0.1.0, numbers
    epoch_sums: EpochSums = field(default_factory=EpochSums)
    scores: DevScores = field(default_factory=DevScores)

    def to_json(self) -> dict[str, Any]:
        """The fields, those of `epoch_sums` and `scores` among them, as progress.json has them."""
        values = asdict(self)
        sums, scores = values.pop("epoch_sums"), values.pop("scores")
        return {"format": FORMAT, **values, **sums, **scores}


def load_progress(path: Path) -> Progress:
    """Where the run stood at a checkpoint that `verify` found whole; what an earlier minbert did not note is empty.

    Raises:
        UserError: progress.json is damaged, or a later minbert wrote it.
    """
    file = path / "progress.json"
    remedy = "restore it from a copy, or use another checkpoint"
    values = without_format(read_json(file, remedy=remedy), str(file))
    for name, record in (("epoch_sums", EpochSums), ("scores", DevScores)):
        values[name] = {key: values.pop(key) for key in (each.name for each in fields(record)) if key in values}
    progress = build(Progress, values, str(file))
    sums, scores = progress.epoch_sums, progress.scores
    counts = (progress.step, progress.examples, progress.skipped, progress.skipped_in_a_row, scores.best_epoch)
    try:
        for number, of_epoch in enumerate(scores.dev):
            check_scores(of_epoch, f"dev[{number}]")
        consistent = (
            min(counts) >= 0
            and progress.seconds >= 0
            and (progress.seconds > 0 or progress.step == 0)
            and scores.best_epoch <= len(scores.dev)
            and all(sums.loss_counts.get(name, 0) >= 1 for name in sums.loss_sums)
            and all(len(pair) == 2 and 0 <= pair[0] <= pair[1] and pair[1] >= 1 for pair in sums.conflicts.values())
        )
        if not consistent:
            raise UserError("its counts contradict each other")
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}") from None
    return progress
