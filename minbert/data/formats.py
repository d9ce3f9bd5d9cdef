"""Readers of file formats: CS224N's quoted tab-separated files, GLUE's plain ones, and JSON objects on lines.

Every physical line is one row, but for the header of tab-separated files, and columns are found by name. A bad row is
left out and noted with its line; a bad file is a `UserError`. Blank lines are ignored.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from minbert.errors import UserError
from minbert.tasks import Task

Labels = Literal["required", "optional", "ignored"]


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: its file, its line (from 1, counting the header) and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Examples:
    """The usable rows of one file, in its order.

    Raises:
        ValueError: fields of different lengths.
    """

    ids: list[str]
    texts: list[str]
    pairs: list[str] | None  # the second sentences of a pair task
    labels: np.ndarray | None  # float32 [n]; None without a label column
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("texts", "pairs", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.ids)} ids; expected one for each")

    def __len__(self) -> int:
        return len(self.ids)


class Row(NamedTuple):
    """A row as it was found: the fields a task needs, or the problem that kept them from being told apart.

    Without an id of its own it has none, and `collect` numbers it.
    """

    line: int
    id: str = ""
    texts: Sequence[str] = ()
    label: str = ""
    problem: str = ""


def read_examples(path: str | Path, task: Task, *, labels: Labels = "optional") -> Examples:
    """Read a CS224N file: tab-separated, fields quoted as CSV, an unnamed index column or two in front.

    One level of CSV quoting is undone and surrounding whitespace is stripped; quotes inside that (the course's files
    were quoted several times over) stay in the text. Unlike in CSV at large, a quoted field ends on its own line, so
    that an unbalanced quote costs one row and not all that follow. Without an `id` or `index` column, ids are row
    numbers from 0.

    Args:
        path: the file.
        task: whose columns and labels to expect.
        labels: whether a label column must be there, is read when it is (else `labels` is None), or is not looked at.

    Raises:
        UserError: the file cannot be read, is empty, is not UTF-8, lacks a column, or has no usable row.
    """
    return _read(Path(path), task, task.columns, task.label, _split_quoted, labels)


def read_glue(path: str | Path, task: Task, *, labels: Labels = "optional") -> Examples:
    """Read a GLUE file: as `read_examples`, but without quoting, and with the columns of `task.glue`."""
    assert task.glue is not None, f"GLUE has no {task.name}"
    return _read(Path(path), task, task.glue.columns, task.glue.label, _split_plain, labels)


def collect(where: str, rows: Iterable[Row], task: Task, labelled: bool) -> Examples:
    """Keep the rows that are fit for `task` and note the others.

    Raises:
        UserError: no row is left.
    """
    kept: list[Row] = []
    labels: list[float] = []
    skipped: list[Skipped] = []
    for row in rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            texts = [text.strip() for text in row.texts]
            if not all(texts):
                raise ValueError("empty text")
            if labelled:
                labels.append(label_of(row.label.strip(), task))
            kept.append(row._replace(texts=texts))
        except ValueError as error:
            skipped.append(Skipped(where, row.line, str(error)))
    if not kept:
        if not skipped:
            raise UserError(f"{where} has no rows under its header; expected examples of {task.title}")
        first = skipped[0]
        raise UserError(f"{where}: none of its {len(skipped)} rows is usable; line {first.line}: {first.reason}")
    return Examples(
        [row.id or str(row.line - 2) for row in kept],
        [row.texts[0] for row in kept],
        [row.texts[1] for row in kept] if task.is_pair else None,
        np.array(labels, np.float32) if labelled else None,
        skipped,
    )


def read_rows(path: str | Path, task: Task) -> Iterable[Row]:
    """The rows of a tab-separated file as `read_examples` takes it, or of JSON objects on lines with the same names.

    Labels and ids may be missing.

    Raises:
        UserError: the file cannot be read, is empty, is not UTF-8, or lacks a column.
    """
    lines = _lines(Path(path))
    if next(filter(str.strip, lines)).lstrip().startswith("{"):
        return (_json_row(number, line, task) for number, line in enumerate(lines, 1) if line.strip())
    rows, _ = _table(Path(path), lines, task.columns, task.label, _split_quoted, "optional")
    return rows


def _json_row(number: int, line: str, task: Task) -> Row:
    try:
        record = json.loads(line)
    except ValueError as error:
        return Row(number, problem=f"not JSON ({error})")
    if not isinstance(record, dict):
        return Row(number, problem=f"expected a JSON object, got a {type(record).__name__}")
    texts = [text for text in map(record.get, task.columns) if isinstance(text, str)]
    if len(texts) < len(task.columns):
        found = ", ".join(map(_short, record)) or "nothing"
        return Row(number, problem=f"expected text for {' and '.join(task.columns)}; found {found}")
    identity, label = (record.get(name) for name in ("id", task.label))
    return Row(number, "" if identity is None else str(identity), texts, "" if label is None else str(label))


def _read(
    path: Path,
    task: Task,
    columns: tuple[str, ...],
    label: str,
    split: Callable[[str], list[str]],
    labels: Labels,
) -> Examples:
    rows, labelled = _table(path, _lines(path), columns, label, split, labels)
    return collect(str(path), rows, task, labelled)


def _table(
    path: Path,
    lines: list[str],
    columns: tuple[str, ...],
    label: str,
    split: Callable[[str], list[str]],
    labels: Labels,
) -> tuple[Iterable[Row], bool]:
    """The rows under a header, and whether they have labels."""
    try:
        header = [name.strip() for name in split(lines[0])]
    except ValueError as error:
        raise UserError(f"{path}, line 1: cannot read the header: {error}") from None
    labelled = labels == "required" or (labels == "optional" and label in header)
    for name in (*columns, *([label] if labelled else [])):
        if name not in header:
            found = ", ".join(map(_short, filter(None, header))) or "no names"
            raise UserError(f"{path}, line 1: no column {name!r} in the header; found {found}")
    text_indices = [header.index(name) for name in columns]
    label_index = header.index(label) if labelled else None
    id_index = next((header.index(name) for name in ("id", "index") if name in header), None)

    def rows() -> Iterable[Row]:
        for number, line in enumerate(lines[1:]):
            if not line.strip():
                continue
            try:
                fields = split(line)
            except ValueError as error:
                yield Row(number + 2, problem=str(error))
                continue
            if len(fields) != len(header):
                yield Row(number + 2, problem=f"expected {len(header)} fields, found {len(fields)}")
                continue
            yield Row(
                number + 2,
                "" if id_index is None else fields[id_index].strip(),
                [fields[index] for index in text_indices],
                "" if label_index is None else fields[label_index],
            )

    return rows(), labelled


def _lines(path: Path) -> list[str]:
    """The physical lines of a UTF-8 file, without their ends."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a tab-separated file") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; convert the file to UTF-8") from None
    if not text.strip():
        raise UserError(f"{path} is empty; expected a header and rows")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _split_quoted(line: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error as error:
        raise ValueError(f"cannot tell its fields apart ({error}); is a quote unbalanced?") from None


def _split_plain(line: str) -> list[str]:
    return line.split("\t")


def label_of(text: str, task: Task) -> float:
    """The label's value.

    Raises:
        ValueError: it is no label of the task.
    """
    if not text:
        raise ValueError("no label")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"label {_short(text)!r} is not a number") from None
    if not 0 <= value <= task.top:
        raise ValueError(f"label {_short(text)} lies outside 0 to {task.top}")
    if not task.is_scored and value != int(value):
        raise ValueError(f"label {_short(text)} is not a whole number")
    return value


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"
