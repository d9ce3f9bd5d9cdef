"""The predictions of a run by class: confusions, precision, recall and F1, and wrong labels that come together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

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
    labels, predicted = _arrays(task, examples)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels,
        predicted,
        labels=[1] if labels.shape[1:] == (1,) else numbers,  # it takes a single column for one of two classes
        average=None,
        zero_division=np.nan,
    )
    found = predicted.sum(axis=0) if task.is_multilabel else np.bincount(predicted, minlength=len(numbers))
    thresholds, ranking = _decisions(task, examples, labels) if task.is_multilabel else ({}, {})
    return [
        ClassScores(
            number,
            int(support[number]),
            int(found[number]),
            _defined(precision[number]),
            _defined(recall[number]),
            _defined(f1[number]) or 0.0,
            thresholds.get(number),
            ranking.get(number),
        )
        for number in numbers
    ]


def _arrays(task: Task, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions: classes [n], or of a multi-label task 0 and 1 [n, C]."""
    labels, predicted = (
        np.array([getattr(example, of) for example in examples]).astype(np.int64) for of in ("label", "predicted")
    )
    return labels, predicted


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

    return metrics.confusion_matrix(*_arrays(task, examples), labels=range(task.num_classes))


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
    labels, predicted = (_sparse(task, each) for each in _arrays(task, examples))
    missed, wrong = (labels - labels.multiply(predicted), predicted - labels.multiply(predicted))
    counts = (missed.T @ wrong).tocoo()
    support = labels.sum(axis=0)
    found = np.flatnonzero(counts.data)
    ranked = found[np.lexsort((counts.col[found], counts.row[found], -counts.data[found]))][:PAIRS]
    triples = ((int(counts.row[at]), int(counts.col[at]), int(counts.data[at])) for at in ranked)
    return [ConfusedPair(true, other, count, float(count / support[true])) for true, other, count in triples]


def _sparse(task: Task, labels: np.ndarray) -> scipy.sparse.csr_array:
    """0 and 1 by example and class, [n, C]."""
    if task.is_multilabel:
        return scipy.sparse.csr_array(labels)
    rows = np.arange(len(labels))
    return scipy.sparse.csr_array((np.ones_like(rows), (rows, labels)), shape=(len(rows), task.num_classes))
