"""The predictions of a run by class: confusions, precision, recall and F1, and wrong labels that come together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        average_precision: of a multi-label task, whatever the threshold; None of a class that no example has.
    """

    number: int
    support: int
    predicted: int
    precision: float | None  # None of a class that is never predicted
    recall: float | None  # None of a class that no example has
    f1: float
    threshold: float | None = None
    average_precision: float | None = None


def class_scores(task: Task, examples: Sequence[Example]) -> list[ClassScores]:
    """Precision, recall and F1 of every class, in the task's order, by scikit-learn."""
    from sklearn import metrics  # it takes a second to import

    numbers = range(task.num_classes)
    labels, predicted = (_indicators(task, [getattr(each, of) for each in examples]) for of in ("label", "predicted"))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels,
        predicted,
        labels=[1] if len(numbers) == 1 else numbers,  # it takes a single column for one of two classes
        average=None,
        zero_division=np.nan,
    )
    thresholds, ranking = _decisions(task, examples, labels) if task.is_multilabel else ({}, {})
    return [
        ClassScores(
            number,
            int(support[number]),
            int(predicted[:, number].sum()),
            _defined(precision[number]),
            _defined(recall[number]),
            _defined(f1[number]) or 0.0,
            thresholds.get(number),
            ranking.get(number),
        )
        for number in numbers
    ]


def _indicators(task: Task, labels: Sequence[Any]) -> np.ndarray:
    """0 and 1 by example and class, int8 [n, C]."""
    if task.is_multilabel:
        return np.array(labels, np.int8)
    found = np.zeros((len(labels), task.num_classes), np.int8)
    found[np.arange(len(labels)), np.array(labels, np.int64)] = 1
    return found


def _decisions(
    task: Task, examples: Sequence[Example], labels: np.ndarray
) -> tuple[dict[int, float], dict[int, float]]:
    """Of a multi-label task, by class: the threshold, and the average precision where it is defined."""
    from sklearn import metrics

    thresholds = dict(enumerate(task.thresholds or [THRESHOLD] * task.num_classes))
    classes = [example.prediction.probabilities for example in examples]
    if None in classes:
        return thresholds, {}
    present = np.flatnonzero(labels.any(axis=0))
    ranked = np.array(classes)
    return thresholds, {
        int(number): float(metrics.average_precision_score(labels[:, number], ranked[:, number])) for number in present
    }


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def confusion(task: Task, examples: Sequence[Example]) -> np.ndarray:
    """How many examples of each class (row) are predicted to be of each class (column), int64 [C, C]."""
    from sklearn import metrics

    labels, predicted = ([int(getattr(example, of)) for example in examples] for of in ("label", "predicted"))
    return metrics.confusion_matrix(labels, predicted, labels=range(task.num_classes))


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
