"""Predictions from head outputs, and scores of predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minbert.tasks import TASKS, Task


def predictions(task: Task, outputs: np.ndarray) -> np.ndarray:
    """A task's predictions, [n], from its head's outputs in evaluation mode ([n, C] logits, or [n]).

    The loss decides how a score follows from an output: they are equal, or the score's share of `max_label` is the
    output's sigmoid, or a cosine. Of two classes the second is predicted for a positive logit, or for a cosine above
    1/2, halfway between the targets of its loss. Multiple negatives ranking only orders pairs; paper 003 gives it no
    threshold, so the logit's is used.
    """
    if task.loss == "cross_entropy":
        return outputs.argmax(axis=-1)
    if not task.is_regression:
        return (outputs > (0.5 if task.loss == "cosine_embedding" else 0.0)).astype(np.int64)
    scores = outputs.astype(np.float64)
    if task.loss == "binary_cross_entropy":
        return task.max_label / (1 + np.exp(-scores))
    return task.max_label * scores if task.loss == "cosine_embedding" else scores


def probabilities(task: Task, outputs: np.ndarray) -> np.ndarray | None:
    """The probability of each class, [n, C], from a head's outputs; None unless they are logits of classes."""
    if task.loss == "cross_entropy":
        logits = outputs.astype(np.float64)
    elif task.loss == "binary_cross_entropy" and not task.is_regression:
        logits = np.stack([np.zeros_like(outputs, np.float64), outputs], axis=-1)
    else:
        return None
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions that equal their label."""
    return float(np.mean(predicted == labels))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 where it is not defined, because all predictions or all labels are equal."""
    x, y = (values.astype(np.float64) - np.mean(values, dtype=np.float64) for values in (predicted, labels))
    scale = np.sqrt(np.dot(x, x) * np.dot(y, y))
    return float(np.dot(x, y) / scale) if scale > 0 else 0.0


METRICS = {"accuracy": accuracy, "pearson": pearson}


def overall(scores: Mapping[str, Mapping[str, float]]) -> float:
    """The mean score of the tasks that are `in_overall` (of all if none is), each mapped to [0, 1].

    For sst, qqp and sts: (sst + qqp + (sts + 1) / 2) / 3, as on the course's leaderboard.
    """
    counted = [name for name in scores if TASKS[name].in_overall] or list(scores)
    unit = [scores[name].get("accuracy", (scores[name].get("pearson", 0.0) + 1) / 2) for name in counted]
    return sum(unit) / len(unit)
