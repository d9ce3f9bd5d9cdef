"""The rows of a user's file, whatever its format: texts on disk, labels as numbers of the different labels."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minbert.data.examples import HIDDEN_LABELS, Examples, Labels, Row, refuse_unusable
from minbert.data.file_formats import NUL, read_own_rows
from minbert.data.line_reader import shorten
from minbert.data.skipped import Skipped
from minbert.data.text_column import TextColumn, TextSpool
from minbert.errors import UserError, one_line
from minbert.files.json_yaml import name_of_type, short
from minbert.tasks import Task
from minbert.tasks.labels import LabelEncoder, split_labels

NUMBER = re.compile(r"[-+]?[\d.,]+([eE][-+]?\d+)?%?")


@dataclass(frozen=True)
class OwnRows:
    """The n usable rows of a file, in its order."""

    file: str
    unit: str  # what `lines` counts: line or row
    ids: list[str]
    lines: np.ndarray  # int64 [n], from 1
    texts: TextColumn
    pairs: TextColumn | None
    labels: list[Any]  # the different labels, as the file has them
    codes: np.ndarray  # int32 [n], of each row's label in `labels`; -1 without one
    skipped: list[Skipped]
    warnings: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        return f"{one_line(self.file)}, {self.unit} {self.lines[index]}"

    def encoded(self, task: Task) -> np.ndarray:
        """The labels inside minbert, float32 [n], or [n, C] of a multi-label task.

        Raises:
            UserError: the task does not have a label; the message names its line.
        """
        encode = LabelEncoder(task)
        shape = (task.num_classes,) if task.is_multilabel else ()
        values = np.zeros((len(self.labels) + 1, *shape), np.float32)  # the last is that of rows without a label
        for code, label in enumerate(self.labels):
            try:
                values[code] = encode(label)
            except ValueError as error:
                rows = np.flatnonzero(self.codes == code)
                more = f" ({len(rows)} rows have it)" if len(rows) > 1 else ""
                raise UserError(f"{self.where(rows[0])}: {one_line(str(error))}{more}") from None
        return values[self.codes]

    def hides_labels(self, task: Task) -> bool:
        """Whether no row has a label: none at all, or -1 where that is no label of the task's."""
        if task.is_multilabel:
            return not any(split_labels(label, task.separator) for label in self.labels)
        if not all(str(label).strip() in HIDDEN_LABELS for label in self.labels):
            return False
        try:
            LabelEncoder(task)(-1)
        except ValueError:
            return True
        return not self.labels

    def examples(self, task: Task, labels: Labels) -> Examples:
        """The rows as examples.

        Raises:
            UserError: the task does not have a label of a row.
        """
        without = labels == "ignored" or (labels == "optional" and self.hides_labels(task))
        values = None if without else self.encoded(task)
        examples = Examples(self.ids, self.texts, self.pairs, values, self.skipped, self.file, self.lines)
        lacking = np.flatnonzero(self.codes < 0)
        if without or task.is_multilabel or not len(lacking):
            return examples
        skipped = [Skipped(self.file, int(self.lines[index]), "no label", self.ids[index]) for index in lacking]
        return replace(examples.select(np.flatnonzero(self.codes >= 0)), skipped=[*self.skipped, *skipped])


def read_own_examples(file: str, task: Task, labels: Labels, option: str = "") -> Examples:
    """The examples of a user's file, as training reads it; arguments and errors as for `read_own`."""
    return read_own(file, task, labels, option=option).examples(task, labels)


def read_own(file: str, task: Task, labels: Labels, split: str = "", option: str = "") -> OwnRows:
    """Read a user's file.

    Args:
        file: a file, a directory of `datasets`, or a name on the hub.
        task: the task of its columns.
        labels: required in every row, optional or ignored.
        split: train, dev or test: which one to take of a directory with several.
        option: what named the file, for messages.

    Raises:
        UserError: the file cannot be read, is of another format than its name says, lacks a column, or has no usable
            row.
    """
    rows, unit = read_own_rows(file, task, labels, split, option)
    return _Collector(file, unit, task, labels).collect(rows)


class _Collector:
    """Collects rows."""

    def __init__(self, file: str, unit: str, task: Task, labels: Labels) -> None:
        self.file, self.unit, self.task = file, unit, task
        self.needs_label = labels == "required" and not task.is_multilabel
        self.spools = [TextSpool() for _ in task.text]
        self.ids: list[str] = []
        self.has_ids = False  # their own, not numbers of rows
        self.lines = array("q")
        self.codes = array("i")
        self.code_of: dict[Any, int] = {}  # of a text, or of the key of another label
        self.labels: list[Any] = []
        self.skipped: list[Skipped] = []
        self.only_numbers = [True] * len(task.text)  # whether all texts of a column are
        self.numbers: dict[str, int] = {}  # by column, the first row whose text is a number and no string

    def collect(self, rows: Iterable[Row]) -> OwnRows:
        for row in rows:
            try:
                self._add(row)
            except ValueError as error:
                self.skipped.append(Skipped(self.file, row.line, one_line(str(error)), row.id or row.number))
        if not self.ids:
            self._refuse_empty()
        columns = [spool.finish() for spool in self.spools]
        return OwnRows(
            self.file,
            self.unit,
            self.ids,
            np.array(self.lines, np.int64),
            columns[0],
            columns[1] if self.task.is_pair else None,
            self.labels,
            np.array(self.codes, np.int32),
            self.skipped,
            self._warnings(),
        )

    def _add(self, row: Row) -> None:
        """Add a row; a ValueError if it cannot be used."""
        contents = _contents(row, self.task)
        for column, text in zip(self.task.text, row.texts, strict=True):
            if type(text) is not str:
                self.numbers.setdefault(column, row.line)
        code = self._code(row.label)
        if code < 0 and self.needs_label:
            raise ValueError("no label")
        for number, content in enumerate(contents):
            self.spools[number].append(content)
            if self.only_numbers[number]:
                self.only_numbers[number] = bool(NUMBER.fullmatch(content.decode()))
        self.has_ids = self.has_ids or bool(row.id)
        self.ids.append(row.id or row.number)
        self.lines.append(row.line)
        self.codes.append(code)

    def _code(self, label: Any) -> int:
        """The number of a label; -1 for none."""
        code = self.code_of.get(label) if type(label) is str else None
        if code is not None:
            return code
        if label is None or (isinstance(label, float) and math.isnan(label)):
            return -1
        if isinstance(label, str):
            if not label.strip():
                return -1
            _encoded(label)
        elif isinstance(label, list | tuple):
            for part in label:
                if not isinstance(part, str | int | float):
                    raise ValueError(f"expected labels in the list of {self.task.label}, got {name_of_type(part)}")
                _encoded(str(part))
            if not self.task.is_multilabel:
                raise ValueError(f"expected one label for {self.task.label}, got a list")
        elif not isinstance(label, int | float):
            raise ValueError(f"expected a label for {self.task.label}, got {name_of_type(label)}")
        key = label if isinstance(label, str) else repr(label).encode()  # 1 and True are different labels
        code = self.code_of.setdefault(key, len(self.labels))
        if code == len(self.labels):
            self.labels.append(label)
        return code

    def _refuse_empty(self) -> None:
        first = self.skipped[0] if self.skipped else None
        refuse_unusable(one_line(self.file), len(self.skipped), first, self.task, self.unit)

    def _warnings(self) -> list[str]:
        where, warnings = one_line(self.file), []
        for column, only_numbers in zip(self.task.text, self.only_numbers, strict=True):
            if only_numbers:
                warnings.append(f"{where}: every text in column {short(column)} is a number; is it the right column?")
            elif column in self.numbers:
                warnings.append(
                    f"{where}, {self.unit} {self.numbers[column]}: a number in the text column {short(column)};"
                    " numbers are read as texts"
                )
        if self.has_ids:
            warnings += self._repeated_ids()
        return warnings

    def _repeated_ids(self) -> list[str]:
        lines: dict[str, int] = {}
        repeated = [
            (identity, line)
            for identity, line in zip(self.ids, self.lines, strict=True)
            if lines.setdefault(identity, line) != line
        ]
        if not repeated:
            return []
        identity, line = repeated[0]
        more = f"; so have {len(repeated) - 1} more" if len(repeated) > 1 else ""
        return [
            f"{one_line(self.file)}: {self.unit}s {lines[identity]} and {line} have the same id"
            f" {one_line(shorten(identity))}{more}"
        ]


def check_own_row(row: Row, task: Task) -> Row:
    """The row with its texts as training reads them.

    Raises:
        ValueError: the row's problem, or a text or an id that cannot be used.
    """
    return row._replace(texts=[content.decode() for content in _contents(row, task)])


def _contents(row: Row, task: Task) -> list[bytes]:
    """The texts of a row; a ValueError if it cannot be used."""
    if row.problem:
        raise ValueError(row.problem)
    contents = [
        _encoded(text.strip()) if type(text) is str else _content_of_number(column, text)
        for column, text in zip(task.text, row.texts, strict=True)
    ]
    if not all(contents):
        raise ValueError("empty text")
    if not row.id.isprintable():
        _check_id(row.id)
    return contents


def _content_of_number(column: str, value: object) -> bytes:
    """The text of a value that is no string."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected text for {column}, got {name_of_type(value)}")
    return str(value).encode()


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError(_why_no_unicode(text)) from None


def _why_no_unicode(text: str) -> str:
    if NUL in text:
        return "a NUL character (is the file UTF-16? convert it to UTF-8)"
    if any("\udc80" <= character <= "\udcff" for character in text):
        return "not UTF-8 text; convert the file to UTF-8"
    return "not Unicode text (half a surrogate pair)"


def _check_id(identity: str) -> None:
    _encoded(identity)
    if "\n" in identity or "\r" in identity:
        raise ValueError("its id contains a line break")
