"""Examples of a task, and the rows that they are made from, in every format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from minbert.data.line_reader import shorten
from minbert.data.skipped import Skipped
from minbert.data.text_column import TextColumn
from minbert.errors import UserError, one_line
from minbert.files.json_yaml import is_unicode, name_of_type
from minbert.tasks import Task
from minbert.tasks.labels import LabelEncoder

Labels = Literal["required", "optional", "ignored"]

HIDDEN_LABELS = ("", "-1", "-1.0")  # in a split without labels


@dataclass(frozen=True)
class Examples:
    """The usable rows of one file, in the file's order.

    Raises:
        ValueError: fields of different lengths.
    """

    ids: list[str]
    texts: Sequence[str]
    pairs: Sequence[str] | None  # the second sentences of a pair task
    labels: np.ndarray | None  # float32 [n], of a multi-label task [n, C]; None without labels
    skipped: list[Skipped] = field(default_factory=list)
    file: str = ""  # the one that they were read from
    lines: np.ndarray | None = None  # int64 [n], the line of each in it, as in `skipped`; None if they are from several

    def __post_init__(self) -> None:
        for name in ("texts", "pairs", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.ids)} ids; expected one for each")

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: np.ndarray) -> Examples:
        """The examples at `indices`, int64, in that order; no rows are skipped."""
        return Examples(
            [self.ids[index] for index in indices],
            _selected(self.texts, indices),
            None if self.pairs is None else _selected(self.pairs, indices),
            None if self.labels is None else self.labels[indices],
            file=self.file,
            lines=None if self.lines is None else self.lines[indices],
        )


def _selected(texts: Sequence[str], indices: np.ndarray) -> Sequence[str]:
    return texts.select(indices) if isinstance(texts, TextColumn) else [texts[index] for index in indices]


class Row(NamedTuple):
    """A row of a file: the fields that a task needs, or the problem that kept them from being read."""

    line: int  # from 1
    number: str  # its id if it has none; empty where its id could not be read
    id: str = ""
    texts: Sequence[Any] = ()  # strings, but for users' files of typed columns
    label: Any = ""
    problem: str = ""


class Columns(NamedTuple):
    """The names of a task's text columns and its label column in a file."""

    texts: tuple[str, ...]
    label: str


def collect(where: str, rows: Iterable[Row], task: Task, labels: Labels) -> Examples:
    """The examples of the rows that `task` can use, and its `skipped` rows.

    Raises:
        UserError: no row can be used.
    """
    rows = list(rows)
    any_label = any(row.label.strip() not in HIDDEN_LABELS for row in rows)
    labelled = labels == "required" or (labels == "optional" and any_label)
    kept: list[Row] = []
    values: list[float | list[float]] = []
    encode_label = LabelEncoder(task)
    skipped: list[Skipped] = []
    for row in rows:
        try:
            row = check_row(row)
            if labelled:
                values.append(encode_label(row.label))
            kept.append(row)
        except ValueError as error:
            skipped.append(Skipped(where, row.line, one_line(str(error)), row.id or row.number))
    if not kept:
        refuse_unusable(where, len(skipped), skipped[0] if skipped else None, task)
    return Examples(
        [row.id or row.number for row in kept],
        [row.texts[0] for row in kept],
        [row.texts[1] for row in kept] if task.is_pair else None,
        np.array(values, np.float32) if labelled else None,
        skipped,
        where,
        np.array([row.line for row in kept], np.int64),
    )


def refuse_unusable(where: str, rows: int, first: Skipped | None, task: Task, unit: str = "") -> NoReturn:
    """Refuse an input without a usable row.

    Args:
        rows: the number of skipped rows.
        first: of them.
        unit: what `Skipped.line` counts in a user's file: line or row.
    """
    if first is None:
        header = "" if unit else " under its header"
        raise UserError(f"{where} has no rows{header}; expected examples of {task.title}")
    raise UserError(f"{where}: none of its {rows} rows is usable; {unit or 'line'} {first.line}: {first.reason}")


def check_row(row: Row) -> Row:
    """The row with its texts stripped.

    Raises:
        ValueError: the row's problem, or a text or an id that cannot be used.
    """
    if row.problem:
        raise ValueError(row.problem)
    texts = [text.strip() for text in row.texts]
    if not all(texts):
        raise ValueError("empty text")
    if not all(map(is_unicode, (row.id, *texts))):
        raise ValueError("not Unicode text (half a surrogate pair)")
    if "\n" in row.id or "\r" in row.id:
        raise ValueError("its id contains a line break")
    return row._replace(texts=texts)


def row_of_record(number: int, record: Mapping[str, Any], columns: Columns, id_column: str) -> Row:
    """The row of a record, which maps names to values of any type.

    Args:
        number: the record's, from 0.
    """
    identifier = record.get(id_column)
    row = Row(number + 1, str(number), "" if identifier is None else str(identifier))
    if isinstance(identifier, Mapping | list):
        problem = f"expected text or a number for {id_column}, got {name_of_type(identifier)}"
        return row._replace(id="", problem=problem)
    if not {*columns.texts} <= {*record}:
        found = ", ".join(map(shorten, record)) or "nothing"
        return row._replace(problem=f"expected text for {' and '.join(columns.texts)}; found {shorten(found, 200)}")
    for name in columns.texts:
        if not isinstance(record[name], str):
            return row._replace(problem=f"expected text for {name}, got {name_of_type(record[name])}")
    label = record.get(columns.label)
    return row._replace(texts=[record[name] for name in columns.texts], label="" if label is None else str(label))
