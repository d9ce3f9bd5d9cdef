"""Examples of a task, and the rows that they come from, whatever the format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from minbert.data.lines import is_unicode, short
from minbert.data.skipped import Skipped
from minbert.errors import UserError, one_line
from minbert.tasks import Task

Labels = Literal["required", "optional", "ignored"]

HIDDEN = ("", "-1", "-1.0")  # labels of a split whose labels are kept back


@dataclass(frozen=True)
class Examples:
    """The usable rows of one file, in its order.

    Raises:
        ValueError: fields of different lengths.
    """

    ids: list[str]
    texts: list[str]
    pairs: list[str] | None  # the second sentences of a pair task
    labels: np.ndarray | None  # float32 [n]; None without labels
    skipped: list[Skipped] = field(default_factory=list)
    file: str = ""  # where they are from

    def __post_init__(self) -> None:
        for name in ("texts", "pairs", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.ids)} ids; expected one for each")

    def __len__(self) -> int:
        return len(self.ids)


class Row(NamedTuple):
    """A row as it was found: the fields a task needs, or the problem that kept them from being told apart."""

    line: int  # from 1
    number: str  # what it goes by without an id; empty where its id could not be read
    id: str = ""  # its own
    texts: Sequence[str] = ()
    label: str = ""
    problem: str = ""


class Columns(NamedTuple):
    """What a file calls a task's texts and its label."""

    texts: tuple[str, ...]
    label: str


def collect(where: str, rows: Iterable[Row], task: Task, labels: Labels) -> Examples:
    """Keep the rows that are fit for `task` and note the others.

    Raises:
        UserError: no row is left.
    """
    rows = list(rows)
    labelled = labels == "required" or (labels == "optional" and any(row.label.strip() not in HIDDEN for row in rows))
    kept: list[Row] = []
    values: list[float] = []
    skipped: list[Skipped] = []
    for row in rows:
        try:
            row = checked(row)
            if labelled:
                values.append(label_of(row.label.strip(), task))
            kept.append(row)
        except ValueError as error:
            skipped.append(Skipped(where, row.line, one_line(str(error)), row.id or row.number))
    if not kept:
        if not skipped:
            raise UserError(f"{where} has no rows under its header; expected examples of {task.title}")
        first = skipped[0]
        raise UserError(f"{where}: none of its {len(skipped)} rows is usable; line {first.line}: {first.reason}")
    return Examples(
        [row.id or row.number for row in kept],
        [row.texts[0] for row in kept],
        [row.texts[1] for row in kept] if task.is_pair else None,
        np.array(values, np.float32) if labelled else None,
        skipped,
        where,
    )


def checked(row: Row) -> Row:
    """The row with its texts stripped.

    Raises:
        ValueError: it has a problem, or a text or an id that cannot be used.
    """
    if row.problem:
        raise ValueError(row.problem)
    texts = [text.strip() for text in row.texts]
    if not all(texts):
        raise ValueError("empty text")
    if not all(map(is_unicode, (row.id, *texts))):
        raise ValueError("not Unicode text (half a surrogate pair)")
    if "\n" in row.id or "\r" in row.id:
        raise ValueError("its id holds a line end")
    return row._replace(texts=texts)


def record_row(number: int, record: Mapping[str, Any], columns: Columns, identity: str) -> Row:
    """The row that a record of any values by name holds.

    Args:
        number: from 0.
        identity: the name of its id.
    """
    own = record.get(identity)
    row = Row(number + 1, str(number), "" if own is None else str(own))
    if isinstance(own, Mapping | list):
        return row._replace(id="", problem=f"expected text or a number for {identity}, got a {type(own).__name__}")
    if not {*columns.texts} <= {*record}:
        found = ", ".join(map(short, record)) or "nothing"
        return row._replace(problem=f"expected text for {' and '.join(columns.texts)}; found {short(found, 200)}")
    for name in columns.texts:
        if not isinstance(record[name], str):
            return row._replace(problem=f"expected text for {name}, got {_kind(record[name])}")
    label = record.get(columns.label)
    return row._replace(texts=[record[name] for name in columns.texts], label="" if label is None else str(label))


def _kind(value: object) -> str:
    return "nothing (null)" if value is None else f"a {type(value).__name__}"


def label_of(text: str, task: Task) -> float:
    """The label's value.

    Raises:
        ValueError: it is no label of the task.
    """
    if not text:
        raise ValueError("no label")
    try:
        value = float(text.replace("_", "?"))  # Python's own numbers may have underscores
    except ValueError:
        raise ValueError(f"label {short(text)!r} is not a number") from None
    if not 0 <= value <= task.top:
        raise ValueError(f"label {short(text)} lies outside 0 to {task.top}")
    if not task.is_scored and value != int(value):
        raise ValueError(f"label {short(text)} is not a whole number")
    return value
