"""Predictions from head outputs, and scores of predictions, by scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import scipy

from minbert.tasks.labels import decode_labels
from minbert.tasks.task import CORRELATIONS, ERRORS, Task

THRESHOLD = 0.5  # of a multi-label task's probabilities, until one is chosen on dev


def predictions(task: Task, outputs: np.ndarray) -> np.ndarray:
    """A task's predictions inside minbert, [n] or [n, C], from its head's outputs in evaluation mode.

    The loss decides how a score follows from an output: they are equal, or the score's share of `max_label` is the
    output's sigmoid, or a cosine. Of two classes the second is predicted for a positive logit, or for a cosine above
    1/2, halfway between the targets of its loss. Multiple negatives ranking only orders pairs; paper 003 gives it no
    threshold, so the logit's is used. A multi-label task predicts each class whose probability is above its threshold.

    Args:
        outputs: [n, C] logits, or [n].
    """
    if task.is_multilabel:
        return (_sigmoid(outputs) > np.array(task.thresholds or THRESHOLD)).astype(np.int64)
    if task.loss == "cross_entropy":
        return outputs.argmax(axis=-1)
    if not task.is_regression:
        return (outputs > (0.5 if task.loss == "cosine_embedding" else 0.0)).astype(np.int64)
    scores = outputs.astype(np.float64)
    if task.loss == "binary_cross_entropy":
        return task.max_label * _sigmoid(outputs)
    return task.max_label * scores if task.loss == "cosine_embedding" else scores


def probabilities(task: Task, outputs: np.ndarray) -> np.ndarray | None:
    """The probability of each class, [n, C], from a head's outputs; None unless they are logits of classes.

    Those of a multi-label task are of each class by itself.
    """
    if task.is_multilabel:
        return _sigmoid(outputs)
    if task.loss == "cross_entropy":
        logits = outputs.astype(np.float64)
    elif task.loss == "binary_cross_entropy" and not task.is_regression:
        logits = np.stack([np.zeros_like(outputs, np.float64), outputs], axis=-1)
    else:
        return None
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _sigmoid(outputs: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * outputs.astype(np.float64)))


def with_thresholds(task: Task, outputs: np.ndarray, labels: np.ndarray) -> Task:
    """A multi-label task with the threshold of each class that has the best F1 on these examples; others as they are.

    A threshold lies halfway between two probabilities, or is 1/2 for a class without examples.

    Args:
        outputs: the head's, [n, C].
        labels: 0 and 1, [n, C].
    """
    if not task.is_multilabel:
        return task
    chosen = [
        _best_threshold(of_class, truth > 0) for of_class, truth in zip(_sigmoid(outputs).T, labels.T, strict=True)
    ]
    return replace(task, thresholds=tuple(chosen))


def _best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    if not truth.any():
        return THRESHOLD
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + truth.sum())
    f1[np.flatnonzero(np.diff(ranked) == 0)] = -1.0  # equal probabilities are predicted together
    best = int(np.argmax(f1))
    below = ranked[best + 1] if best + 1 < len(ranked) else 0.0
    return float((ranked[best] + below) / 2)


def score(
    task: Task, predicted: np.ndarray, labels: np.ndarray, probabilities: np.ndarray | None = None
) -> dict[str, float]:
    """The task's metrics by name, the one that decides first.

    A correlation is 0 where it is not defined, because all predictions or all labels are equal; so is a score of
    classes of which none is there. Errors are in the units of the user's scale.

    Args:
        predicted, labels: inside minbert, [n], or [n, C] of a multi-label task.
        probabilities: of the classes, [n, C]; for roc_auc and average_precision, which take 0 and 1 from `predicted`
            where there are none.
    """
    with warnings.catch_warnings():  # scikit-learn and scipy warn where a score is not defined
        warnings.simplefilter("ignore")
        values = {metric: _metric(task, metric, predicted, labels, probabilities) for metric in task.metrics}
    return {metric: value if np.isfinite(value) else 0.0 for metric, value in values.items()}


def _metric(
    task: Task, metric: str, predicted: np.ndarray, labels: np.ndarray, probabilities: np.ndarray | None
) -> float:
    if task.is_regression:
        return _regression_metric(metric, *(np.array(decode_labels(task, each)) for each in (predicted, labels)))
    from sklearn import metrics  # it takes a second to import

    predicted, labels = predicted.astype(np.int64), labels.astype(np.int64)
    if metric == "accuracy":
        return float(metrics.accuracy_score(labels, predicted))
    if metric == "mcc":
        return float(metrics.matthews_corrcoef(labels, predicted))
    if metric in ("f1", "f1_micro", "f1_macro"):
        binary = metric == "f1" and task.num_classes == 2 and not task.is_multilabel
        average = "binary" if binary else "micro" if metric == "f1_micro" else "macro"
        classes = {} if binary or task.is_multilabel else {"labels": np.union1d(labels, predicted)}
        return float(metrics.f1_score(labels, predicted, average=average, zero_division=0.0, **classes))
    function = {"roc_auc": metrics.roc_auc_score, "average_precision": metrics.average_precision_score}[metric]
    truth = labels if task.is_multilabel else np.eye(task.num_classes)[labels]
    if probabilities is None:
        probabilities = predicted if task.is_multilabel else np.eye(task.num_classes)[predicted]
    columns = [1] if task.num_classes == 2 and not task.is_multilabel else range(task.num_classes)
    both = [column for column in columns if 0 < truth[:, column].mean() < 1]  # else the score is not defined
    scores = [function(truth[:, column], probabilities[:, column]) for column in both]
    return float(np.mean(scores)) if scores else 0.0


def _regression_metric(metric: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    if metric in ERRORS:
        difference = predicted - labels
        return float(np.mean(difference**2 if metric == "mse" else np.abs(difference)))
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return float((scipy.stats.pearsonr if metric == "pearson" else scipy.stats.spearmanr)(predicted, labels).statistic)


def unit(metric: str, value: float) -> float:
    """A score brought to 0..1: correlations as (x + 1) / 2, an error x as 1 / (1 + x)."""
    return (value + 1) / 2 if metric in CORRELATIONS else 1 / (1 + value) if metric in ERRORS else value


def overall(scores: Mapping[str, Mapping[str, float]], tasks: Iterable[Task]) -> float:
    """The mean of the tasks' first metrics, each brought to 0..1, of the tasks that are `in_overall`.

    Tasks whose first metric is an error are left out too. If no task remains, all count. For sst, qqp and sts:
    (sst + qqp + (sts + 1) / 2) / 3, as on the course's leaderboard.
    """
    left_out = {task.name for task in tasks if not task.in_overall or task.metric in ERRORS}
    first = {name: next(iter(of_task.items())) for name, of_task in scores.items()}
    counted = [name for name in scores if name not in left_out] or list(scores)
    return sum(unit(*first[name]) for name in counted) / len(counted)
