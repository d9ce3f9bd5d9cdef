"""Predictions: TASK-SPLIT-output.csv, and TASK-SPLIT.jsonl with labels, probabilities and lengths.

A task of the CS224N project has its output.csv in the project's format; every other task has CSV (RFC 4180).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minbert.data import Encoded
from minbert.errors import UserError
from minbert.files.atomic import write_atomically, writing
from minbert.files.json_yaml import read_json_lines
from minbert.files.schema_checks import build
from minbert.runs.scores import expect
from minbert.tasks import Task
from minbert.tasks.labels import LabelEncoder, decode_labels
from minbert.tasks.metrics import predictions, probabilities

Label = bool | int | float | str


@dataclass(frozen=True)
class PredictedExample:
    """What a run predicts for one example.

    The file has labels of the user's; `read_predictions` gives the index of a class, a score on the user's scale, or
    for a multi-label task 0 or 1 for each class.
    """

    id: str
    predicted: Any  # Label, or a list of them
    tokens: int  # that the model read
    label: Any = None
    probabilities: list[float] | None = None  # of each class; None for a task without classes


@dataclass(frozen=True)
class _Line:
    """A `PredictedExample` as the file has it."""

    id: str
    predicted: Label | list[Label]
    tokens: int
    label: Label | list[Label] | None = None
    probabilities: list[float] | None = None


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
    with writing(path, "free some space and run minbert evaluate"):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(format_predictions(task, examples.ids, outputs)))
        write_atomically(_details(directory, task, split), "".join(_format_details(task, examples, outputs)))
    return path


def format_predictions(task: Task, ids: Sequence[str], outputs: np.ndarray) -> Iterator[str]:
    """The lines of an output.csv: `format_header`, then `format_rows`."""
    yield format_header(task, outputs)
    yield from format_rows(task, ids, outputs)


def format_header(task: Task, outputs: np.ndarray) -> str:
    """The first line of an output.csv: id and prediction, and if it is CSV each class's probability.

    Args:
        outputs: the head's for some examples, which say whether classes have probabilities.
    """
    if task.course is not None:
        return f"id \t {task.course.column} \n"
    classes = () if probabilities(task, outputs) is None else task.classes or ()
    return _csv_line(["id", "prediction", *(f"probability of {label_text(label)}" for label in classes)])


def format_rows(task: Task, ids: Sequence[str], outputs: np.ndarray) -> Iterator[str]:
    """The other lines of an output.csv.

    Args:
        outputs: the head's for every example, [n, C] or [n].
    """
    labels = decode_labels(task, predictions(task, outputs))
    if task.course is not None:
        yield from (f"{identifier} , {label} \n" for identifier, label in zip(ids, labels, strict=True))
        return
    if task.is_regression:
        labels = [round(label, _decimals(task)) for label in labels]
    classes = probabilities(task, outputs)
    for number, (identifier, label) in enumerate(zip(ids, labels, strict=True)):
        values = [] if classes is None else [f"{value:.6f}" for value in classes[number]]
        yield _csv_line([identifier, _field(task, label), *values])


def _csv_line(fields: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(fields)  # it quotes a carriage return only if its lines end with one
    return line.getvalue().removesuffix("\r\n") + "\n"


def _field(task: Task, label: Label | list[Label]) -> str:
    """A label as a field; several ones joined by the separator, or as a JSON list where a class contains it."""
    if not isinstance(label, list):
        return label_text(label)
    if any(task.separator in label_text(each) for each in task.classes or ()):
        return json.dumps(label, ensure_ascii=False)
    return task.separator.join(map(label_text, label))


def label_text(label: Label) -> str:
    """A class as the users' files and the reports have it; booleans are true and false."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def stem_of(task: Task) -> str:
    """The start of the names of a task's prediction files."""
    return task.course.stem if task.course else task.name


def _details(directory: Path, task: Task, split: str) -> Path:
    return directory / f"{stem_of(task)}-{split}.jsonl"


def _format_details(task: Task, examples: Encoded, outputs: np.ndarray) -> Iterator[str]:
    """A line of JSON for every example, without the fields that are None."""
    predicted = decode_labels(task, predictions(task, outputs))
    rows: dict[str, Sequence[Any]] = {"id": examples.ids, "predicted": predicted, "tokens": examples.lengths.tolist()}
    if examples.labels is not None:
        labels = decode_labels(task, examples.labels)
        rows["label"] = _rounded(task, labels) if task.is_regression else labels
    classes = probabilities(task, outputs)
    if classes is not None:
        rows["probabilities"] = classes.round(6).tolist()
    for values in zip(*rows.values(), strict=True):
        yield json.dumps(dict(zip(rows, values, strict=True))) + "\n"


def _decimals(task: Task) -> int:
    """Decimals of a score that float32 keeps: six of a scale such as 0 to 5, fewer of a larger one."""
    low, high = task.scale
    return max(0, 6 - math.floor(math.log10(high - low)))


def _rounded(task: Task, labels: Sequence[float]) -> list[float]:
    """Labels with these decimals, and the scale's ends as they are, which may have more."""
    low, high = task.scale
    return [min(max(round(label, _decimals(task)), low), high) for label in labels]


def read_predictions(directory: Path, task: Task, split: str, remedy: str) -> list[PredictedExample] | None:
    """What `write_predictions` wrote, in the order of the examples; None if there is no such file.

    Raises:
        UserError: it is damaged; the line ends with `remedy`.
    """
    path = _details(directory, task, split)
    if not path.exists():
        return None
    found, encode = [], LabelEncoder(task)
    for number, line in read_json_lines(path, remedy):
        try:
            if isinstance(line, ValueError):
                raise line
            found.append(_checked(build(_Line, line, task.name), task, encode))
        except (ValueError, UserError) as error:
            raise UserError(f"{path} is damaged (line {number}: {error}); {remedy}") from None
    return found


def _checked(line: _Line, task: Task, encode: LabelEncoder) -> PredictedExample:
    expect(line.tokens >= 0, "tokens", "0 or more", line.tokens)
    predicted, label = (_read_label(getattr(line, name), name, task, encode) for name in ("predicted", "label"))
    expect(predicted is not None, "predicted", "a label", None)
    if task.is_regression and label is not None:
        low, high = task.scale
        expect(low <= label <= high, "label", f"{low:g} to {high:g}", label)
    classes = line.probabilities
    if classes is not None:
        fits = not task.is_regression and len(classes) == task.num_classes and all(0 <= each <= 1 for each in classes)
        expect(fits, "probabilities", f"{task.num_classes} shares", classes)
    return PredictedExample(line.id, predicted, line.tokens, label, classes)


def _read_label(value: Any, name: str, task: Task, encode: LabelEncoder) -> Any:
    """A label of the file as `PredictedExample` has it; None for none."""
    if value is None:
        return None
    if task.is_regression:
        expect(isinstance(value, int | float) and not isinstance(value, bool), name, "a number", value)
        return value
    expect(isinstance(value, list) == task.is_multilabel, name, "a list" if task.is_multilabel else "a label", value)
    found = encode(value)
    return [int(each) for each in found] if isinstance(found, list) else int(found)
