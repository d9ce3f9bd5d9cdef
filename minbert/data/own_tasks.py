"""The source of a user's own tasks: the files that the records of a tasks file name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minbert.data.examples import Examples
from minbert.data.held_out import dev_rows, text_hashes
from minbert.data.own_rows import OwnRows, read_own
from minbert.data.source import SPLITS
from minbert.errors import UserError, did_you_mean, one_line
from minbert.files.json_yaml import short
from minbert.tasks import Task
from minbert.tasks.labels import class_key, decode_labels, infer_classes, split_labels
from minbert.tasks.tasks_file import MOST_CLASSES

SHOWN = 8  # classes that a message names


class OwnTasks:
    """The own tasks by name, and their files.

    A task that is passed to a method has the classes; where its files are, and their columns, its record says.
    """

    def __init__(self, own: Mapping[str, Task]) -> None:
        files = dict.fromkeys(Path(str(task.train)).name for task in own.values())
        self.name = _listed([one_line(file) for file in files])
        self._own = dict(own)
        self._rows: dict[tuple[str, str], OwnRows] = {}  # by task and split
        self._held: dict[str, np.ndarray] = {}  # by task, which rows of train a dev share holds out

    def tasks(self) -> list[str]:
        return list(self._own)

    def splits(self, task: Task) -> list[str]:
        record = self._own.get(task.name)
        return [split for split in SPLITS if record is not None and getattr(record, split) is not None]

    def complete(self, task: Task) -> Task:
        if task.is_regression or task.classes is not None:
            return task
        rows = self._read(task, "train")
        labels = rows.labels
        if task.is_multilabel:
            labels = [part for label in labels for part in split_labels(label, task.separator)]
        classes = infer_classes(labels)
        where = f"{one_line(rows.file)}: column {short(task.label)}"
        if len(classes) < 2:
            found = f"one label, {short(classes[0])}," if classes else "no label"
            raise UserError(f"{where} has {found} in all {len(rows)} rows; expected two classes or more")
        if len(classes) > MOST_CLASSES:
            raise UserError(
                f"{where} has {len(classes)} different labels; expected at most {MOST_CLASSES} classes"
                " (scores are type: regression)"
            )
        if isinstance(task.class_weights, Mapping):
            known = [class_key(each) for each in classes]
            for name in task.class_weights:
                if class_key(name) not in known:
                    guess = did_you_mean(name, known)
                    raise UserError(f"task {task.name}: class_weights: no class {short(name)}{guess} in {rows.file}")
        return replace(task, classes=classes)

    def load(self, task: Task, split: str) -> Examples:
        if split not in self.splits(task):
            if task.name not in self._own:
                have = _listed(self.tasks())
                raise UserError(
                    f"{self.name} has no {split} split of {task.name}; it has {have}; give --data for others"
                )
            raise UserError(f"task {task.name} has no {split} split; its record has {' and '.join(self.splits(task))}")
        record = self._own[task.name]
        share = record.dev if isinstance(record.dev, float) and task.dev is not None else None
        if split == "dev" and isinstance(record.dev, float):
            examples = self._train(task)
            held = self._held_out(task, examples, record.dev)
            if not len(held):
                few = record.dev * len(examples) < 0.5
                reason = "is less than half an example" if few else "is none, as each class keeps one to train on"
                raise UserError(
                    f"{one_line(examples.file)}: dev: {record.dev:g} of its {len(examples)} examples of {task.name}"
                    f" {reason}; give a larger share, or a file"
                )
            return examples.select(held)
        if split == "train":
            examples = self._train(task)
            if share is None:
                return examples
            kept = np.ones(len(examples), bool)
            kept[self._held_out(task, examples, share)] = False
            return replace(examples.select(np.flatnonzero(kept)), skipped=examples.skipped)
        return self._read(task, split).examples(task, "optional" if split == "test" else "required")

    def warnings(self, task: Task) -> list[str]:
        rows = {split: self._rows[task.name, split] for split in SPLITS if (task.name, split) in self._rows}
        warnings = [line for of_split in rows.values() for line in of_split.warnings]
        if "train" not in rows:
            return warnings
        warnings += self._leaks(task)
        labels = rows["train"].encoded(task)
        if task.is_regression:
            return [*warnings, *_unused_scale(task, rows["train"], labels)]
        warnings += _merged_labels(task, rows["train"])
        if task.is_multilabel:
            warnings += _absent_separator(task, rows["train"])
        where = one_line(rows["train"].file)
        unseen = _absent_classes(task, labels)
        if unseen:
            warnings.append(f"{where}: no example of {_counted_classes(unseen)} in the training data")
        held = self._held.get(task.name)
        if held is not None:
            lacking = [each for each in _absent_classes(task, labels[held]) if each not in unseen]
            if lacking:
                warnings.append(
                    f"{where}: dev, a share of it, has no example of {_counted_classes(lacking)}, which"
                    f" {'has' if len(lacking) == 1 else 'have'} too few"
                )
        return warnings

    def _leaks(self, task: Task) -> list[str]:
        """A warning if a dev file has texts of the training file."""
        train, dev = (self._rows.get((task.name, split)) for split in ("train", "dev"))
        if train is None or dev is None:
            return []
        shared = np.isin(text_hashes(dev.texts, dev.pairs), text_hashes(train.texts, train.pairs))
        if not shared.any():
            return []
        return [
            f"{one_line(dev.file)}: texts of {shared.sum()} of the {len(dev)} dev examples are also trained on, the"
            f" first on {dev.unit} {dev.lines[np.argmax(shared)]}"
        ]

    def _train(self, task: Task) -> Examples:
        """All training examples, with those of a dev share.

        Raises:
            UserError: all have the same label.
        """
        rows = self._read(task, "train")
        examples = rows.examples(task, "required")
        assert examples.labels is not None
        if (examples.labels == examples.labels[:1]).all():
            (label,) = decode_labels(task, examples.labels[:1])
            raise UserError(
                f"{one_line(rows.file)}: column {short(task.label)} has one label, {_shown(label)}, in all"
                f" {len(rows)} rows; there is nothing to learn"
            )
        return examples

    def _held_out(self, task: Task, examples: Examples, share: float) -> np.ndarray:
        if task.name not in self._held:
            self._held[task.name] = dev_rows(examples, task, share)
        return self._held[task.name]

    def _read(self, task: Task, split: str) -> OwnRows:
        key = (task.name, split)
        if key not in self._rows:
            record = self._own[task.name]
            self._rows[key] = read_own(
                str(getattr(record, split)),
                replace(record, classes=task.classes),
                "optional" if split == "test" else "required",
                split,
                f"task {task.name}: {split}:",
            )
        return self._rows[key]


def _absent_classes(task: Task, labels: np.ndarray) -> list[Any]:
    """The classes that no example has."""
    counts = labels.sum(0) if task.is_multilabel else np.bincount(labels.astype(np.int64), minlength=task.num_classes)
    return [task.classes[number] for number in np.flatnonzero(counts == 0)] if task.classes else []


def _merged_labels(task: Task, rows: OwnRows) -> list[str]:
    """A warning if two texts are one class as numbers, such as the versions 3.1 and 3.10."""
    texts: dict[str, str] = {}
    for label in rows.labels:
        for part in split_labels(label, task.separator) if task.is_multilabel else [label]:
            text = str(part).strip()
            key = class_key(part)
            if "." in key and texts.setdefault(key, text) != text:
                return [
                    f"{one_line(rows.file)}: the labels {short(texts[key])} and {short(text)} are one class, the number"
                    f" {key}; write them as texts that are no numbers if they are two"
                ]
    return []


def _absent_separator(task: Task, rows: OwnRows) -> list[str]:
    texts = [label for label in rows.labels if isinstance(label, str)]
    if len(texts) < len(rows.labels) or not texts or any(task.separator in text for text in texts):
        return []
    others = [other for other in (";", ",", "|", " ") if any(other in text for text in texts)]
    hint = f'; did you mean `separator: "{others[0]}"`?' if others else ""
    return [
        f"{one_line(rows.file)}: the separator {task.separator!r} is in no label of column {short(task.label)}:"
        f" each row has one label at most{hint}"
    ]


def _unused_scale(task: Task, rows: OwnRows, labels: np.ndarray) -> list[str]:
    low, high = decode_labels(task, np.array([labels.min(), labels.max()]))
    if high - low >= (task.scale[1] - task.scale[0]) / 2:
        return []
    return [
        f"{one_line(rows.file)}: the labels of {task.name} are {low:.4g} to {high:.4g}, so most of the scale"
        f" {task.scale[0]:g} to {task.scale[1]:g} is unused; scale: [{low:.4g}, {high:.4g}] may learn better"
    ]


def _shown(label: object) -> str:
    if isinstance(label, list):
        return _listed([short(each) for each in label]) or "none"
    return f"{label:g}" if isinstance(label, float) else short(label)


def _counted_classes(classes: Sequence[object]) -> str:
    noun = "the class" if len(classes) == 1 else f"{len(classes)} classes,"
    return f"{noun} {_listed([short(each) for each in classes])}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
