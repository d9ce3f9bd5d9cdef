"""The predictions of a run by class: confusions, precision, recall and F1, and wrong labels that come together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minbert.report.error_analysis import Example
from minbert.tasks import Task
from minbert.tasks.metrics import THRESHOLD

PAIRS = 30  # confused pairs that are shown at most


@dataclass(frozen=True)
class ClassScores:
    """How well a class is predicted.

    Args:
        number: of the class, from 0, in the task's order.
        support: examples that have it.
        predicted: examples that are predicted to have it.
        threshold: of a multi-label task, the probability above which it is predicted.
    """

    number: int
    support: int
    predicted: int
    precision: float | None  # None of a class that is never predicted
    recall: float | None  # None of a class that no example has
    f1: float
    threshold: float | None = None


def class_scores(task: Task, examples: Sequence[Example]) -> list[ClassScores]:
    """Precision, recall and F1 of every class, in the task's order."""
    support, predicted, both = (np.zeros(task.num_classes, np.int64) for _ in range(3))
    for example in examples:
        true, found = classes_of(task, example.label), classes_of(task, example.predicted)
        support[true] += 1
        predicted[found] += 1
        both[[number for number in found if number in true]] += 1
    thresholds = task.thresholds or [THRESHOLD] * task.num_classes
    return [
        ClassScores(
            number,
            int(support[number]),
            int(predicted[number]),
            float(both[number] / predicted[number]) if predicted[number] else None,
            float(both[number] / support[number]) if support[number] else None,
            float(2 * both[number] / max(1, support[number] + predicted[number])),
            thresholds[number] if task.is_multilabel else None,
        )
        for number in range(task.num_classes)
    ]


def confusion(task: Task, examples: Sequence[Example]) -> np.ndarray:
    """How many examples of each class (row) are predicted to be of each class (column), int64 [C, C]."""
    counts = np.zeros((task.num_classes, task.num_classes), np.int64)
    for example in examples:
        counts[int(example.label), int(example.predicted)] += 1
    return counts


@dataclass(frozen=True)
class ConfusedPair:
    """Two classes, by their numbers, of which the second is predicted in the place of the first."""

    true: int
    predicted: int
    examples: int
    share: float  # of the examples that have the first


def confused_pairs(task: Task, examples: Sequence[Example]) -> list[ConfusedPair]:
    """The pairs of classes that are confused, the most frequent ones first, `PAIRS` at most.

    Of a multi-label task an example counts for each pair of a class that it lacks and one that is wrongly predicted.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    support: Counter[int] = Counter()
    for example in examples:
        true, predicted = classes_of(task, example.label), classes_of(task, example.predicted)
        support.update(true)
        pairs.update((one, other) for one in true if one not in predicted for other in predicted if other not in true)
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:PAIRS]
    return [ConfusedPair(true, predicted, count, count / support[true]) for (true, predicted), count in ranked]


def classes_of(task: Task, label: object) -> list[int]:
    """The numbers of the classes in a label or a prediction, in the task's order."""
    if task.is_multilabel:
        assert isinstance(label, list)
        return [number for number, each in enumerate(label) if each]
    return [int(label)]  # type: ignore[call-overload]
