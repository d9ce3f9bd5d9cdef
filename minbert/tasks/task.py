"""What a task is: its columns, labels, loss, metric and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# How a pair is read, and how many sequences that makes: as one, [CLS] a [SEP] b [SEP]; each sentence by itself,
# [CLS] a [SEP] and [CLS] b [SEP]; or all three of these.
PAIR_ENCODINGS = {"cross-encoder": 1, "bi-encoder": 2, "both": 3}


@dataclass(frozen=True)
class Glue:
    """Where GLUE keeps a task: its folder, its columns and its configuration name on the hub."""

    folder: str
    columns: tuple[str, ...]
    label: str
    hub: str


@dataclass(frozen=True)
class Task:
    """What minbert knows of a task. Labels lie in [0, `top`]; whole numbers unless they are scores."""

    name: str
    title: str
    columns: tuple[str, ...]  # the text columns: one for single sentences, two for pairs
    label: str  # the label column
    top: int  # the largest label
    loss: str  # of `minbert.methods.losses.LOSSES`
    metric: Literal["accuracy", "pearson"]
    predictions: str  # name of its prediction files, and their label column in the course's format
    predicted: str
    files: Mapping[str, str] = field(default_factory=dict)  # CS224N file of each split
    glue: Glue | None = None
    head: str = "linear"  # of `minbert.model.HEADS`
    headline: bool = True  # whether the overall score counts it
    evaluated: bool = True  # whether it has a dev split; an auxiliary task is only trained on

    @property
    def is_pair(self) -> bool:
        return len(self.columns) == 2

    @property
    def is_scored(self) -> bool:
        """Whether labels are scores on a scale; else they are classes."""
        return self.metric == "pearson"

    @property
    def outputs(self) -> int:
        """Numbers a head gives for one example: logits of the classes, one logit, or one score."""
        return self.top + 1 if self.loss == "cross_entropy" else 1
