"""Labels of the users' files as numbers inside minbert, and back.

Inside, a label is a float32: the index of its class; for a regression the score with its scale brought to 0 to 5;
for a multi-label task a row of 0 and 1. Every regression has STS-B's scale inside, not 0 to 1: STS-B's recipes,
learning rates and the shares of several tasks in one update hold for it then, whatever its own scale is, and a task on
0 to 5 is computed as it stands in its file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from minbert.files.json_yaml import short
from minbert.tasks.task import SCORE_TOP, Label, Task

NUMBER = re.compile(r"[-+]?((\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|nan|inf|infinity)", re.IGNORECASE)
MOST_DIGITS = 18  # of a class that is a number; longer ones are identifiers
_CANONICAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")  # a text that is a number and looks like one: not 007
_BOOLEANS = {form for word in ("true", "false") for form in (word, word.capitalize(), word.upper())}


def class_key(label: object) -> str:
    """What two labels of one class have in common.

    1, 1.0 and the texts "1" and " 1.0 " are one class; so are true and the texts "true", "True" and "TRUE".
    """
    text = str(label).strip()
    if text in _BOOLEANS:
        return text.lower()
    if _CANONICAL.fullmatch(text):
        whole, _, fraction = text.partition(".")
        if fraction.strip("0"):
            return repr(float(text))
        return "0" if whole == "-0" else whole  # with all of its digits: it may be a long identifier
    return text


def infer_classes(labels: Iterable[object]) -> tuple[Label, ...]:
    """The sorted classes of labels: numbers by value where all are numbers, booleans, else texts."""
    by_key: dict[str, Any] = {}
    for label in labels:
        by_key.setdefault(class_key(label), label)
    if by_key and all(isinstance(label, bool) for label in by_key.values()):
        return tuple(sorted(by_key.values()))
    if all(_CANONICAL.fullmatch(key) and len(key.partition(".")[0]) <= MOST_DIGITS for key in by_key):
        return tuple(sorted(float(key) if "." in key else int(key) for key in by_key))
    return tuple(sorted(str(label).strip() if key in _BOOLEANS else key for key, label in by_key.items()))


class LabelEncoder:
    """Encodes the labels of a task, whose classes are known."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._index = {class_key(label): number for number, label in enumerate(task.classes or ())}
        self._is_range = list(map(repr, task.classes or ())) == list(map(str, range(len(task.classes or ()))))

    def __call__(self, label: object) -> float | list[float]:
        """A label as a float, or for a multi-label task a row of 0 and 1.

        Raises:
            ValueError: the task has no such label.
        """
        if self.task.is_multilabel:
            row = [0.0] * self.task.num_classes
            for part in split_labels(label, self.task.separator):
                row[self._class(part)] = 1.0
            return row
        if label is None or (isinstance(label, str) and not label.strip()):
            raise ValueError("no label")
        return self._score(label) if self.task.is_regression else float(self._class(label))

    def _class(self, label: object) -> int:
        number = self._index.get(class_key(label))
        if number is None:
            if self._is_range:
                _check_whole(label, len(self._index) - 1)
            known = ", ".join(short(each) for each in (self.task.classes or ())[:8])
            more = f" and {len(self._index) - 8} more" if len(self._index) > 8 else ""
            raise ValueError(f"label {short(label)} is none of the classes {known}{more}")
        return number

    def _score(self, label: object) -> float:
        value = _number(label)
        low, high = self.task.scale
        if not low <= value <= high:
            raise ValueError(f"label {_shown(label)} is outside {low:g} to {high:g}")
        return (value - low) * (SCORE_TOP / (high - low))


def _number(label: object) -> float:
    text = str(label).strip()
    if isinstance(label, bool) or not NUMBER.fullmatch(text):
        raise ValueError(f"label {_shown(label, quoted=True)} is not a number")
    return float(text)


def _check_whole(label: object, largest: int) -> None:
    """Refuse what is no number, not in 0 to `largest`, or no whole number, each for its own reason."""
    value = _number(label)
    if not 0 <= value <= largest:
        raise ValueError(f"label {_shown(label)} is outside 0 to {largest}")
    raise ValueError(f"label {_shown(label)} is not a whole number")


def _shown(label: object, quoted: bool = False) -> str:
    text = str(label).strip()
    text = text if len(text) <= 40 else text[:39] + "…"
    return repr(text) if quoted else text


def split_labels(label: object, separator: str) -> list[object]:
    """The labels in a field of a multi-label task: a list, or texts between separators; none in an empty field."""
    if label is None:
        return []
    if isinstance(label, list | tuple):
        return list(label)
    return [part.strip() for part in str(label).split(separator) if part.strip()]


def decode_labels(task: Task, values: np.ndarray) -> list[Any]:
    """The user's labels from predictions or labels inside minbert: for a multi-label task lists of them."""
    if task.is_regression:
        low, high = task.scale
        scores = values.astype(np.float64) * ((high - low) / SCORE_TOP) + low
        return scores.tolist()
    classes = task.classes or ()
    if task.is_multilabel:
        return [[classes[number] for number in np.flatnonzero(row)] for row in values]
    return [classes[int(value)] for value in values]
