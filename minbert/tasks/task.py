"""The record of a task: its columns, labels, loss, metric and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Glue:
    """A task's folder, columns and label in GLUE, and its configuration on the hub."""

    folder: str
    columns: tuple[str, ...]
    label: str
    hub: str


@dataclass(frozen=True)
class Task:
    """A task. Its labels are in [0, `max_label`]: integers, or real numbers of a regression."""

    name: str
    title: str
    columns: tuple[str, ...]  # the text columns: one for single sentences, two for pairs
    label: str  # the label column
    max_label: int
    loss: str  # of `minbert.methods.losses.LOSSES`
    prediction_stem: str  # the start of its prediction files' names
    prediction_column: str  # of its labels in prediction files in the course's format
    metric: Literal["accuracy", "pearson"] = "accuracy"
    files: Mapping[str, str] = field(default_factory=dict)  # CS224N file of each split
    glue: Glue | None = None
    head: str = "linear"  # of `minbert.model.HEADS`
    in_overall: bool = True  # whether the overall score includes it
    evaluated: bool = True  # whether it has a dev split; an auxiliary task is only trained on

    @property
    def is_pair(self) -> bool:
        return len(self.columns) == 2

    @property
    def is_regression(self) -> bool:
        """Whether labels are scores; else they are classes."""
        return self.metric == "pearson"

    @property
    def num_outputs(self) -> int:
        """Outputs of a head for one example: a logit of each class, one logit, or one score."""
        return self.max_label + 1 if self.loss == "cross_entropy" else 1
