"""Sources of examples: the demo corpus, a directory of CS224N files or GLUE folders, the hub, and reviews."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minbert.data import demo
from minbert.data.examples import Columns, Examples, collect, row_of_record
from minbert.data.formats import columns_of, read_file
from minbert.data.own_tasks import OwnTasks
from minbert.data.skipped import Skipped
from minbert.data.source import SPLITS, Source
from minbert.data.star_reviews import read_reviews
from minbert.errors import UserError, first_line
from minbert.files.hub import import_datasets
from minbert.tasks import TASKS, Task

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}  # and validation_matched where there are genres
HUB_LABEL = "label"  # the label column of every task of GLUE on the hub
ACCEPTED = (
    "--data takes a directory of CS224N files (ids-sst-train.csv, quora-train.csv, ...), a directory of GLUE folders "
    "(QQP/train.tsv, ...) or a hub name such as nyu-mll/glue"
)


def open_source(data: str | None, own: Mapping[str, Task] | None = None) -> Source:
    """The source that `--data` and a tasks file name.

    Args:
        data: a directory or a hub name; when None, the own tasks, or the demo corpus without any.
        own: the records of a tasks file by name; they take the place of the data's tasks of the same name.

    Raises:
        UserError: no such directory or hub name, or a directory that holds no known file.
    """
    if own:
        return OwnTasks(own) if data is None else WithOwnTasks(_named_source(data), OwnTasks(own))
    return DemoSource() if data is None else _named_source(data)


def _named_source(data: str) -> Source:
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


class BuiltInTasks:
    """A source of built-in tasks, whose classes are known."""

    def complete(self, task: Task) -> Task:
        return task

    def warnings(self, task: Task) -> list[str]:
        return []


class DemoSource(BuiltInTasks):
    """The built-in corpus."""

    name = "the built-in demo corpus"

    def tasks(self) -> list[str]:
        return list(demo.GENERATORS)

    def splits(self, task: Task) -> list[str]:
        return list(SPLITS) if task.name in demo.GENERATORS else []

    def load(self, task: Task, split: str) -> Examples:
        if split not in self.splits(task):
            have = ", ".join(demo.GENERATORS)
            raise UserError(f"{self.name} has no {split} split of {task.name}; it has {have}; give --data for others")
        return demo.examples(task.name, split)


class FolderSource(BuiltInTasks):
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

    def load(self, task: Task, split: str) -> Examples:
        found = self._find(task, split)
        if found is None:
            files = " or ".join(_candidates(task, split)) or "file known for it"
            raise UserError(
                f"{self.name} has no {split} split of {task.name}: no {files}; add it or choose other tasks"
            )
        examples = read_file(found, task, labels="optional" if split == "test" else "required")
        is_other = task.glue is not None and found.name == task.glue.other_files.get("train")
        return _without(examples, self.load(task, "dev")) if is_other and "dev" in self.splits(task) else examples

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
        return task if task.name == self.task else self._source.complete(task)

    def warnings(self, task: Task) -> list[str]:
        return [] if task.name == self.task else self._source.warnings(task)

    def load(self, task: Task, split: str) -> Examples:
        if task.name == self.task and split == "train":
            return read_reviews(self._path, self._per_star, self._seed)
        return self._source.load(task, split)


class WithOwnTasks:
    """A source, and own tasks, which take the place of its tasks of the same name."""

    def __init__(self, source: Source, own: OwnTasks) -> None:
        self.name = f"{source.name} and {own.name}"
        self._source, self._own = source, own

    def _of(self, task: Task) -> Source:
        return self._own if task.name in self._own.tasks() else self._source

    def tasks(self) -> list[str]:
        return list(dict.fromkeys([*self._source.tasks(), *self._own.tasks()]))

    def splits(self, task: Task) -> list[str]:
        return self._of(task).splits(task)

    def complete(self, task: Task) -> Task:
        return self._of(task).complete(task)

    def load(self, task: Task, split: str) -> Examples:
        return self._of(task).load(task, split)

    def warnings(self, task: Task) -> list[str]:
        return self._of(task).warnings(task)


def _candidates(task: Task, split: str) -> list[str]:
    """The files that may hold a split."""
    candidates = [task.course.files[split]] if task.course and split in task.course.files else []
    name = _name_in_glue(task, split, {each: each for each in SPLITS})
    if task.glue and name:
        other = task.glue.other_files.get(split)
        candidates += [f"{task.glue.folder}/{file}" for file in (f"{name}.tsv", other) if file]
    return candidates


def _name_in_glue(task: Task, split: str, names: Mapping[str, str]) -> str:
    """What GLUE calls a task's split; empty if the task has none there.

    Args:
        names: by split, what it is called where a task has one dev set.
    """
    if task.glue is None or split not in names or (split == "train" and task.head_of):
        return ""
    return names[split] + (f"_{task.glue.genres}" if task.glue.genres and split != "train" else "")


def _without(examples: Examples, others: Examples) -> Examples:
    """The examples whose texts are none of the others'; those that are become skipped rows."""
    known = set(zip(others.texts, others.pairs or others.texts, strict=True))
    texts = list(zip(examples.texts, examples.pairs or examples.texts, strict=True))
    kept = [number for number, each in enumerate(texts) if each not in known]
    assert examples.lines is not None
    skipped = [
        Skipped(examples.file, int(examples.lines[number]), "also an example of the dev split", examples.ids[number])
        for number, each in enumerate(texts)
        if each in known
    ]
    return replace(
        examples,
        ids=[examples.ids[number] for number in kept],
        texts=[examples.texts[number] for number in kept],
        pairs=examples.pairs and [examples.pairs[number] for number in kept],
        labels=None if examples.labels is None else examples.labels[kept],
        skipped=sorted([*examples.skipped, *skipped], key=lambda row: row.line),
        lines=examples.lines[kept],
    )


class HubSource(BuiltInTasks):
    """GLUE on the hub, read by the optional package `datasets`.

    Raises:
        UserError: `datasets` is not installed, or the hub has no such data set with a task that minbert knows.
    """

    def __init__(self, name: str) -> None:
        datasets = import_datasets(
            f"no such directory: {name!r}; if it names a data set on the hub, install the extra that reads it: "
            f"pip install 'minbert[data]'; {ACCEPTED}"
        )
        self.name = name
        self._datasets = datasets
        configs = set(self._call(datasets.get_dataset_config_names))
        self._tasks = {task.name: task.glue for task in TASKS.values() if task.glue and task.glue.hub in configs}
        if not self._tasks:
            known = ", ".join(dict.fromkeys(task.glue.hub for task in TASKS.values() if task.glue))
            raise UserError(f"the hub's {name} has none of the configurations that minbert knows: {known}")

    def tasks(self) -> list[str]:
        return [name for name in self._tasks if not TASKS[name].head_of]

    def splits(self, task: Task) -> list[str]:
        if task.name not in self._tasks:
            return []
        names = self._call(self._datasets.get_dataset_split_names, self._tasks[task.name].hub)
        return [split for split in SPLITS if _name_in_glue(task, split, HUB_SPLITS) in names]

    def load(self, task: Task, split: str) -> Examples:
        if split not in self.splits(task):
            raise UserError(
                f"the hub's {self.name} has no {split} split of {task.name}; it has {', '.join(self.tasks())}"
            )
        glue, name = self._tasks[task.name], _name_in_glue(task, split, HUB_SPLITS)
        table = self._call(self._datasets.load_dataset, glue.hub, split=name)
        texts = next((each.texts for each in columns_of(task) if {*each.texts} <= {*table.column_names}), glue.columns)
        absent = {*texts, HUB_LABEL} - {*table.column_names}
        if absent:
            found = ", ".join(table.column_names)
            raise UserError(f"{self.name}/{glue.hub}: no column {', '.join(sorted(absent))}; found {found}")
        columns = {each: table[each] for each in (*texts, HUB_LABEL, "idx") if each in table.column_names}
        columns[HUB_LABEL] = map(_class_of_number(task, table), columns[HUB_LABEL])
        rows = (
            row_of_record(number, dict(zip(columns, values, strict=True)), Columns(tuple(texts), HUB_LABEL), "idx")
            for number, values in enumerate(zip(*columns.values(), strict=True))
        )
        where = f"{self.name}/{glue.hub}/{name}"
        return collect(where, rows, task, "optional" if split == "test" else "required")

    def _call(self, function: Callable[..., Any], *arguments: str, **options: str) -> Any:
        """Call a function of `datasets`; the hub's errors become one line."""
        try:
            return function(self.name, *arguments, **options)
        except (OSError, ValueError) as error:  # no such data set, no permission, no network
            raise UserError(
                f"no such directory: {self.name!r}, nor can it be read from the hub: {first_line(error)}; {ACCEPTED}"
            ) from None


def _class_of_number(task: Task, table: Any) -> Callable[[Any], Any]:
    """From a label on the hub, the number of a class, to the class, where the task's classes are texts.

    The table says which number is which class; else they are in the task's order.
    """
    feature = (getattr(table, "features", None) or {}).get(HUB_LABEL)
    names = getattr(feature, "names", None) or task.classes or ()
    if not any(isinstance(each, str) for each in task.classes or ()):
        return lambda label: label
    return lambda label: names[label] if type(label) is int and 0 <= label < len(names) else label
