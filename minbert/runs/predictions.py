"""Predictions: TASK-SPLIT-output.csv in the course's format, and TASK-SPLIT.jsonl with labels and probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minbert.data import Encoded
from minbert.errors import UserError
from minbert.files.atomic import write_atomically, writing
from minbert.files.json_yaml import read_json_lines
from minbert.files.schema_checks import build
from minbert.runs.scores import expect
from minbert.tasks import Task
from minbert.tasks.metrics import predictions, probabilities


@dataclass(frozen=True)
class Prediction:
    """What a run predicts for one example."""

    id: str
    predicted: int | float
    tokens: int  # that the model read
    label: float | None = None
    probabilities: list[float] | None = None  # of each class; None for a task without classes


def write_predictions(directory: Path, task: Task, split: str, examples: Encoded, outputs: np.ndarray) -> Path:
    """Write both files of a task and split.

    Args:
        outputs: the head's for every example, [n, C] or [n].

    Returns:
        the file in the course's format.

    Raises:
        UserError: the disk is full.
    """
    path = directory / f"{stem_of(task)}-{split}-output.csv"
    with writing(path, "free some space and run minbert.evaluate"):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(format_predictions(task, examples.ids, predictions(task, outputs))))
        write_atomically(_details(directory, task, split), "".join(_format_details(task, examples, outputs)))
    return path


def format_predictions(task: Task, ids: Sequence[str], predicted: np.ndarray) -> list[str]:
    """Lines in the course's format: a header, then `id , prediction`."""
    lines = [f"{identifier} , {value} \n" for identifier, value in zip(ids, predicted.tolist(), strict=True)]
    return [f"id \t {task.course.column if task.course else task.label} \n", *lines]


def stem_of(task: Task) -> str:
    """The start of the names of a task's prediction files."""
    return task.course.stem if task.course else task.name


def _details(directory: Path, task: Task, split: str) -> Path:
    return directory / f"{stem_of(task)}-{split}.jsonl"


def _format_details(task: Task, examples: Encoded, outputs: np.ndarray) -> Iterator[str]:
    """A `Prediction` as a line of JSON for every example, without the fields that are None."""
    rows = {"id": examples.ids, "predicted": predictions(task, outputs).tolist(), "tokens": examples.lengths.tolist()}
    if examples.labels is not None:
        rows["label"] = examples.labels.astype(np.float64).round(4).tolist()
    classes = probabilities(task, outputs)
    if classes is not None:
        rows["probabilities"] = classes.round(6).tolist()
    for values in zip(*rows.values(), strict=True):
        yield json.dumps(dict(zip(rows, values, strict=True))) + "\n"


def read_predictions(directory: Path, task: Task, split: str, remedy: str) -> list[Prediction] | None:
    """What `write_predictions` wrote, in the order of the examples; None if there is no such file.

    Raises:
        UserError: it is damaged; the line ends with `remedy`.
    """
    path = _details(directory, task, split)
    if not path.exists():
        return None
    found = []
    for number, line in read_json_lines(path, remedy):
        try:
            if isinstance(line, ValueError):
                raise line
            found.append(_checked(build(Prediction, line, task.name), task))
        except (ValueError, UserError) as error:
            raise UserError(f"{path} is damaged (line {number}: {error}); {remedy}") from None
    return found


def _checked(found: Prediction, task: Task) -> Prediction:
    expect(found.tokens >= 0, "tokens", "0 or more", found.tokens)
    for name, value in (("predicted", found.predicted), ("label", found.label)):
        if value is not None and not task.is_regression:
            expect(value in range(task.max_label + 1), name, f"a class from 0 to {task.max_label}", value)
    expect(found.label is None or 0 <= found.label <= task.max_label, "label", f"0 to {task.max_label}", found.label)
    classes = found.probabilities
    if classes is not None:
        fits = not task.is_regression and len(classes) == task.max_label + 1 and all(0 <= each <= 1 for each in classes)
        expect(fits, "probabilities", f"{task.max_label + 1} shares", classes)
    return found
