"""What the losses of a run's tasks take besides outputs and labels: class weights and label smoothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from minbert.data import Encoded
from minbert.errors import UserError, did_you_mean
from minbert.files.json_yaml import short
from minbert.methods.losses import accepts
from minbert.options_by_task import smoothing_of
from minbert.tasks import Task
from minbert.tasks.labels import class_key


def loss_options(
    tasks: Sequence[Task], train: Mapping[str, Encoded], smoothing: float | Mapping[str, float], device: torch.device
) -> dict[str, dict[str, Any]]:
    """The keyword arguments of the tasks' losses, by task; only those that are set.

    Args:
        train: by task, its training examples, which decide balanced class weights.
        smoothing: --label-smoothing.

    Raises:
        UserError: a class weight of no class, class weights or smoothing for a loss that takes none, or smoothing for
            all tasks of which none takes it.
    """
    options: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    for task in tasks:
        if task.class_weights is not None:
            if not accepts(task.loss, "class_weights"):
                raise UserError(f"task {task.name}: class_weights: its loss {task.loss} takes none; leave them out")
            labels = train[task.name].labels
            assert labels is not None  # training data has labels
            weights = torch.from_numpy(class_weights(task, labels).astype(np.float32))
            options[task.name]["class_weights"] = weights.to(device)
        if share := smoothing_of(task, smoothing):
            options[task.name]["label_smoothing"] = share
    if smoothing and not isinstance(smoothing, Mapping) and not any("label_smoothing" in of for of in options.values()):
        names = ", ".join(options)
        raise UserError(f"--label-smoothing {smoothing:g}: no loss of the tasks {names} takes it; leave it out")
    return options


def class_weights(task: Task, labels: np.ndarray) -> np.ndarray:
    """The class weights of a task's record, float64 [C]; 1 for classes that it names none for.

    Balanced weights of a classification are n / (C count), as scikit-learn's: all classes then weigh the same in all.
    Those of a multi-label task are negatives / positives: having a class and not having it then weigh the same. A class
    that all training examples have, or none has, gets 1.

    Args:
        labels: of the training examples, [n], or [n, C] of a multi-label task.

    Raises:
        UserError: the record has a weight for what is no class.
    """
    weights = np.ones(task.num_classes)
    if task.class_weights == "balanced":
        n = len(labels)
        if task.is_multilabel:
            counts = (labels > 0).sum(0).astype(np.float64)
            some = (counts > 0) & (counts < n)
            weights[some] = (n - counts[some]) / counts[some]
        else:
            counts = np.bincount(labels.astype(np.int64), minlength=task.num_classes)
            weights[counts > 0] = n / (task.num_classes * counts[counts > 0])
        return weights
    numbers = {class_key(label): number for number, label in enumerate(task.classes or ())}
    for label, weight in (task.class_weights or {}).items():
        number = numbers.get(class_key(label))
        if number is None:
            known = ", ".join(map(short, list(numbers)[:8])) + (", ..." if len(numbers) > 8 else "")
            hint = did_you_mean(str(label), list(numbers))
            raise UserError(f"task {task.name}: class_weights: unknown class {short(label)}{hint}; known: {known}")
        weights[number] = weight
    return weights
