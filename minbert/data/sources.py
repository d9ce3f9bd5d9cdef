"""Sources of examples: the demo corpus, a directory of CS224N files or GLUE folders, the hub, and reviews."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from minbert.data import demo
from minbert.data.examples import Columns, Examples, collect, row_of_record
from minbert.data.formats import read_file
from minbert.data.star_reviews import read_reviews
from minbert.errors import UserError, first_line
from minbert.tasks import TASKS, Task

SPLITS = ("train", "dev", "test")
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
HUB_LABEL = "label"  # the label column of every task of GLUE on the hub
ACCEPTED = (
    "--data takes a directory of CS224N files (ids-sst-train.csv, quora-train.csv, ...), a directory of GLUE folders "
    "(QQP/train.tsv, ...) or a hub name such as nyu-mll/glue"
)


class Source(Protocol):
    """Examples of some tasks, in splits train, dev and test."""

    name: str

    def tasks(self) -> list[str]:
        """Names of the tasks that have a train split."""

    def splits(self, task: Task) -> list[str]:
        """The splits that `task` has here, in the order train, dev, test."""

    def complete(self, task: Task) -> Task:
        """The task with its classes, which the training file has if the record does not name them.

        Raises:
            UserError: they cannot be read.
        """

    def load(self, task: Task, split: str) -> Examples:
        """Read one split; train and dev have labels, test may lack them.

        Raises:
            UserError: the split is missing, or its file is bad.
        """


def open_source(data: str | None, own: Mapping[str, Task] | None = None) -> Source:
    """The source that `--data` names: a directory, a hub name, or the demo corpus when it is None.

    Args:
        own: records of a tasks file.

    Raises:
        UserError: no such directory or hub name, or a directory that holds no known file.
    """
    if data is None:
        return DemoSource()
    directory = os.path.expanduser(data)
    if os.path.isdir(directory):
        return FolderSource(Path(directory))
    if os.path.exists(directory):
        raise UserError(f"{data} is a file; {ACCEPTED}")
    if names_hub(data):
        return HubSource(data)
    raise UserError(f"no such directory: {data!r}; {ACCEPTED}")


def names_hub(data: str) -> bool:
    """Whether it names a data set on the hub: OWNER/NAME, and no local file or directory."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", data)) and not os.path.exists(data)


class DemoSource:
    """The built-in corpus."""

    name = "the built-in demo corpus"

    def tasks(self) -> list[str]:
        return list(demo.GENERATORS)

    def splits(self, task: Task) -> list[str]:
        return list(SPLITS) if task.name in demo.GENERATORS else []

    def complete(self, task: Task) -> Task:
        return task

    def load(self, task: Task, split: str) -> Examples:
        if split not in self.splits(task):
            have = ", ".join(demo.GENERATORS)
            raise UserError(f"{self.name} has no {split} split of {task.name}; it has {have}; give --data for others")
        return demo.examples(task.name, split)


class FolderSource:
    """A directory with CS224N files, GLUE folders, or both (a task's CS224N file comes first)."""

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self._directory = directory
        if not any(self.splits(task) for task in TASKS.values()):
            looked_for = [candidate for task in TASKS.values() for candidate in _candidates(task, "train")]
            raise UserError(f"{self.name} holds no file that minbert knows; looked for {', '.join(looked_for)}")

    def tasks(self) -> list[str]:
        return [name for name, task in TASKS.items() if "train" in self.splits(task)]

    def splits(self, task: Task) -> list[str]:
        return [split for split in SPLITS if self._find(task, split)]

    def complete(self, task: Task) -> Task:
        return task

    def load(self, task: Task, split: str) -> Examples:
        found = self._find(task, split)
        if found is None:
            files = " or ".join(_candidates(task, split)) or "file known for it"
            raise UserError(
                f"{self.name} has no {split} split of {task.name}: no {files}; add it or choose other tasks"
            )
        return read_file(found, task, labels="optional" if split == "test" else "required")

    def _find(self, task: Task, split: str) -> Path | None:
        files = [self._directory / name for name in _candidates(task, split)]
        return next((file for file in files if os.path.lexists(file)), None)


class WithReviews:
    """A source, and reviews with stars as the train split of one more task."""

    task = "yelp"

    def __init__(self, source: Source, path: str, per_star: int, seed: int) -> None:
        self.name = f"{source.name} and {path}"
        self._source, self._path, self._per_star, self._seed = source, path, per_star, seed

    def tasks(self) -> list[str]:
        return [*self._source.tasks(), self.task]

    def splits(self, task: Task) -> list[str]:
        return ["train"] if task.name == self.task else self._source.splits(task)

    def complete(self, task: Task) -> Task:
        return self._source.complete(task)

    def load(self, task: Task, split: str) -> Examples:
        if task.name == self.task and split == "train":
            return read_reviews(self._path, self._per_star, self._seed)
        return self._source.load(task, split)


def _candidates(task: Task, split: str) -> list[str]:
    """The files that may hold a split."""
    candidates = [task.course.files[split]] if task.course and split in task.course.files else []
    return [*candidates, *([f"{task.glue.folder}/{split}.tsv"] if task.glue and split in SPLITS else [])]


class HubSource:
    """GLUE on the hub, read by the optional package `datasets`.

    Raises:
        UserError: `datasets` is not installed, or the hub has no such data set with a task that minbert knows.
    """

    def __init__(self, name: str) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"no such directory: {name!r}; if it names a data set on the hub, install the extra that reads it: "
                f"pip install 'minbert[data]'; {ACCEPTED}"
            ) from None
        self.name = name
        self._datasets = datasets
        configs = set(self._call(datasets.get_dataset_config_names))
        self._tasks = {task.name: task.glue for task in TASKS.values() if task.glue and task.glue.hub in configs}
        if not self._tasks:
            known = ", ".join(task.glue.hub for task in TASKS.values() if task.glue)
            raise UserError(f"the hub's {name} has none of the configurations that minbert knows: {known}")

    def tasks(self) -> list[str]:
        return list(self._tasks)

    def splits(self, task: Task) -> list[str]:
        if task.name not in self._tasks:
            return []
        names = self._call(self._datasets.get_dataset_split_names, self._tasks[task.name].hub)
        return [split for split in SPLITS if HUB_SPLITS[split] in names]

    def complete(self, task: Task) -> Task:
        return task

    def load(self, task: Task, split: str) -> Examples:
        if split not in self.splits(task):
            raise UserError(
                f"the hub's {self.name} has no {split} split of {task.name}; it has {', '.join(self._tasks)}"
            )
        glue = self._tasks[task.name]
        table = self._call(self._datasets.load_dataset, glue.hub, split=HUB_SPLITS[split])
        absent = {*glue.columns, HUB_LABEL} - set(table.column_names)
        if absent:
            found = ", ".join(table.column_names)
            raise UserError(f"{self.name}/{glue.hub}: no column {', '.join(sorted(absent))}; found {found}")
        names = [*glue.columns, HUB_LABEL, *(["idx"] if "idx" in table.column_names else [])]
        rows = (
            row_of_record(number, dict(zip(names, values, strict=True)), Columns(tuple(glue.columns), HUB_LABEL), "idx")
            for number, values in enumerate(zip(*(table[name] for name in names), strict=True))
        )
        where = f"{self.name}/{glue.hub}/{HUB_SPLITS[split]}"
        return collect(where, rows, task, "optional" if split == "test" else "required")

    def _call(self, function: Callable[..., Any], *arguments: str, **options: str) -> Any:
        """Call a function of `datasets`; the hub's errors become one line."""
        try:
            return function(self.name, *arguments, **options)
        except (OSError, ValueError) as error:  # no such data set, no permission, no network
            raise UserError(
                f"no such directory: {self.name!r}, nor can it be read from the hub: {first_line(error)}; {ACCEPTED}"
            ) from None
