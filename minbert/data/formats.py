r"""Readers of file formats: tables with a header as in CS224N and GLUE, JSON objects on lines, and bare lines.

A file of an own task is read in the format that its name says, if it says one (`minbert.data.file_formats`). Of
others, training, evaluating, predicting and augmenting read a file with `read_file` or `read_rows`, and the file's name
and its first line that is not blank decide the format:

1. JSON objects on lines, where the name ends in .json, .jsonl or .ndjson, or the line is a JSON object.
2. A table, where the line has a text column of the task by its name in the course or in GLUE. A .tsv file of a task
   that GLUE has is GLUE's: tabs separate the fields and nothing is quoted. A .csv file, and any table of a task that
   GLUE does not have, is the course's: its fields are quoted as in CSV as well. Under any other name a table is GLUE's
   if its header has GLUE's names and not the course's, or an `index` and no `id`. GLUE has tables without a header
   (CoLA's): they are known by the number of their fields.
3. Bare lines, where the caller allows them: each is a sentence, or a pair separated by a tab; nothing is quoted.

Only `\n` or `\r\n` ends a line, and each line is one row. Columns are found by name. One level of quoting is undone,
and whitespace around fields is stripped. A quoted field ends on its own line, so an unbalanced quote costs one row and
not all that follow; quotes inside it (the course's files were quoted several times over) stay in the text.

A blank line is an empty text in a table of one column and among bare lines, and ignored elsewhere. The id of a row
without one is its number, from 0: of its line for JSON and bare lines, of its line below the header in a table. A bad
row is skipped and recorded with its line, its id and the reason; a bad file is a `UserError`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from minbert.data.examples import Columns, Examples, Labels, Row, check_row, collect, refuse_unusable, row_of_record
from minbert.data.file_formats import is_own_format, read_own_rows
from minbert.data.line_reader import STANDARD_INPUT, Pipe, pipe_of, read_lines, shorten, split_quoted
from minbert.data.own_rows import check_own_row, read_own_examples
from minbert.data.skipped import Skipped
from minbert.errors import UserError, one_line
from minbert.files.json_yaml import name_of_type, parse_object
from minbert.tasks import Task

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
IDS = ("id", "index")  # names of the id column; the first one present is used
Split = Callable[[str], tuple[list[str], str]]


def read_windows(path: str | Path, task: Task, size: int, *, option: str = "") -> Iterator[Examples]:
    """The examples of an input of `predict` as it comes, in its order: `read_file` with bare lines and without labels.

    Args:
        path: a file, a pipe, or `-` for standard input.
        size: rows of a window. One of standard input ends earlier where no further row is there yet.
        option: the option that named the file, for messages.

    Yields:
        windows of at least one row; all rows of one may be skipped.

    Raises:
        UserError: as `read_file`, when the rows are read; that no row is usable, at the end.
    """
    pipe = pipe_of(path)
    named = "standard input" if str(path) == STANDARD_INPUT else str(path)
    unit, check = "", check_row
    if _is_own(path, task):
        rows, unit = read_own_rows(str(path), task, "ignored", option=option)
        check = partial(check_own_row, task=task)
    else:
        rows = iter(read_rows(path, task, labels="ignored", bare=True, option=option, pipe=pipe))
    usable, skipped_rows, first = 0, 0, None
    while window := list(_window(rows, size, pipe)):
        kept: list[Row] = []
        skipped: list[Skipped] = []
        for row in window:
            try:
                kept.append(check(row))
            except ValueError as error:
                skipped.append(Skipped(named, row.line, one_line(str(error)), row.id or row.number))
        usable, skipped_rows, first = (
            usable + len(kept),
            skipped_rows + len(skipped),
            first or next(iter(skipped), None),
        )
        texts, *pairs = ([row.texts[number] for row in kept] for number in range(len(task.text)))
        ids, lines = [row.id or row.number for row in kept], np.array([row.line for row in kept], np.int64)
        yield Examples(ids, texts, pairs[0] if pairs else None, None, skipped, named, lines)
    if not usable:
        refuse_unusable(one_line(named) if unit else named, skipped_rows, first, task, unit)


def _window(rows: Iterator[Row], size: int, pipe: Pipe | None) -> Iterator[Row]:
    """The next rows, at most `size`, and of a pipe those that are there after the first."""
    for number, row in enumerate(rows, 1):
        yield row
        if number == size or (pipe is not None and pipe.waits()):
            return


def read_file(
    path: str | Path, task: Task, *, labels: Labels = "optional", bare: bool = False, option: str = ""
) -> Examples:
    """Read a file in the format of its name and its first line.

    Args:
        path: the file. With `bare` also a pipe, or `-` for standard input.
        task: the task of its columns and labels.
        labels: required in every row; optional: read if any row has one, and else None; or ignored.
        bare: whether a file without a header may be bare lines.
        option: the option that named the file, for messages.

    Raises:
        UserError: the file cannot be read, is empty, is not UTF-8, lacks a column, or has no usable row.
    """
    if _is_own(path, task):
        return read_own_examples(str(path), task, labels, option)
    named = "standard input" if bare and str(path) == "-" else str(path)
    return collect(named, read_rows(path, task, labels=labels, bare=bare, option=option), task, labels)


def read_examples(path: str | Path, task: Task, *, labels: Labels = "optional") -> Examples:
    """Read a table of the course under any name: as `read_file`, with fields quoted as in CSV."""
    return collect(str(path), read_rows(path, task, labels=labels, quoted=True), task, labels)


def read_glue(path: str | Path, task: Task, *, labels: Labels = "optional") -> Examples:
    """Read a table of GLUE under any name: as `read_file`, without quoting."""
    return collect(str(path), read_rows(path, task, labels=labels, quoted=False), task, labels)


def read_rows(
    path: str | Path,
    task: Task,
    *,
    labels: Labels = "optional",
    bare: bool = False,
    quoted: bool | None = None,
    option: str = "",
    pipe: Pipe | None = None,
) -> Iterable[Row]:
    """The rows of a file in the format of its name and its first line; arguments as for `read_file`.

    Args:
        quoted: if given, the file is a table, with quoted fields or without.
        pipe: `pipe_of` the path, if the caller asks it whether rows are there.

    Raises:
        UserError: the file cannot be read, is empty, is not UTF-8, or lacks a column; some of it when the rows are
            read.
    """
    if quoted is None and _is_own(path, task):
        return map(_of_texts, read_own_rows(str(path), task, labels, option=option)[0])
    shape = f"{'pair of sentences separated by a tab' if task.is_pair else 'sentence'} per line"
    expected = f"a header and rows, or a {shape}" if bare else "a tab-separated file"
    lines = read_lines(path, expected, option=option, pipes=bare, pipe=pipe)
    start, first = next(((number, line) for number, line in enumerate(lines) if line.strip()), (0, None))
    if first is None:
        raise UserError(
            f"{f'{option} ' if option else ''}{path} is empty; expected a {shape if bare else 'header and rows'}"
        )
    lines = itertools.chain([first], lines)
    if quoted is None and (Path(path).suffix.lower() in JSON_SUFFIXES or _is_object(first)):
        return (_json_row(number, line, task) for number, line in enumerate(lines, start) if line.strip())
    where = f"{'standard input' if bare and str(path) == '-' else path}, line {start + 1}"
    names = _names(first)
    fixed = task.glue.without_header if task.glue else []
    if not (quoted or _is_header(names, task)) and len(_split_plain(first)[0]) == len(fixed):
        return _table_rows(fixed, _columns(where, fixed, task, False, labels), _split_plain, lines, start)
    if not _is_header(names, task):
        _refuse_other_delimiters(where, first, task)
    if bare and not _is_header(names, task):
        blank = itertools.repeat("", start)  # lines, each of which is an empty text
        return (_bare_row(number, line, task) for number, line in enumerate(itertools.chain(blank, lines)))
    if quoted is None:
        quoted = not _is_glue(Path(path).suffix.lower(), names, task)
    if quoted and split_quoted(first)[1]:
        raise UserError(f"{where}: cannot read the header: {split_quoted(first)[1]}")
    columns = _columns(where, names, task, quoted, labels)
    next(lines)
    return _table_rows(names, columns, split_quoted if quoted else _split_plain, lines, start + 1)


def _is_own(path: str | Path, task: Task) -> bool:
    """Whether it is a file of an own task, whose format its name says."""
    return task.course is None and task.glue is None and is_own_format(str(path))


def _of_texts(row: Row) -> Row:
    """The row with a problem if a text is none."""
    other = next((text for text in row.texts if not isinstance(text, str)), "")
    return (
        row if isinstance(other, str) else row._replace(texts=(), problem=f"expected text, got {name_of_type(other)}")
    )


# Tables ------------------------------------------------------------------------------------------------------------


def _names(line: str) -> list[str]:
    """The fields of a header, without quotes in either kind of table."""
    fields, problem = split_quoted(line)
    return [name.strip() for name in (_split_plain(line)[0] if problem else fields)]


def columns_of(task: Task) -> list[Columns]:
    """A task's columns in the course's files and in GLUE's."""
    course = Columns(task.text, task.label)
    return [course, Columns(tuple(task.glue.columns), task.glue.label)] if task.glue else [course]


def _is_header(names: Sequence[str], task: Task) -> bool:
    """Whether a first line is a header: it names a text column, or an id column and another."""
    known = {name for columns in columns_of(task) for name in columns.texts}
    return not known.isdisjoint(names) or (len(names) > 1 and not {*IDS}.isdisjoint(names))


def _is_glue(suffix: str, names: Sequence[str], task: Task) -> bool:
    """Whether a table is GLUE's, with nothing quoted."""
    if task.glue is None or suffix in (".tsv", ".csv"):
        return task.glue is not None and suffix == ".tsv"
    if not (task.course and task.course.files):
        return True
    return {*task.glue.columns} <= {*names} and (
        not {*task.text} <= {*names} or ("index" in names and "id" not in names)
    )


def _columns(where: str, names: Sequence[str], task: Task, quoted: bool, labels: Labels) -> Columns:
    """The columns of the task's texts and its label in a table; no label if it is not needed and missing.

    Raises:
        UserError: a column is missing or repeated.
    """
    known = columns_of(task)[:: 1 if quoted else -1]
    columns = next((columns for columns in known if {*columns.texts} <= {*names}), known[0])
    label = next((each.label for each in (columns, *known) if each.label in names), "")
    if labels == "ignored" or (labels == "optional" and not label):
        label = ""
    elif not label:
        label = columns.label
    for name in filter(None, (*columns.texts, label)):
        if name not in names:
            found = ", ".join(one_line(shorten(other)) for other in names if other) or "no names"
            raise UserError(f"{where}: no column {name!r} in the header; found {shorten(found, 200)}")
    for name in filter(None, (*IDS, *columns.texts, label)):
        if names.count(name) > 1:
            raise UserError(f"{where}: the header has the column {name!r} twice; expected one")
    return Columns(columns.texts, label)


def _table_rows(
    names: Sequence[str], columns: Columns, split: Split, lines: Iterable[str], start: int
) -> Iterator[Row]:
    """The rows of a table without its header; the first one's line is number `start`, from 0."""
    texts = [names.index(name) for name in columns.texts]
    label = names.index(columns.label) if columns.label else None
    id_column = next((names.index(name) for name in IDS if name in names), None)
    for number, line in enumerate(lines):
        if len(names) > 1 and not line.strip() and "\t" not in line:
            continue
        fields, problem = split(line)
        if not problem and "\0" in line:
            problem = "a NUL character (is the file UTF-16? convert it to UTF-8)"
        elif not problem and len(fields) != len(names):
            problem = f"expected {len(names)} fields, found {len(fields)}"
        identifier = fields[id_column].strip() if id_column is not None and id_column < len(fields) else ""
        own_number = "" if problem and id_column is not None else str(number)
        row = Row(start + number + 1, own_number, identifier, problem=problem)
        if not problem:
            row = row._replace(texts=[fields[index] for index in texts], label="" if label is None else fields[label])
        yield row


def _split_plain(line: str) -> tuple[list[str], str]:
    return line.split("\t"), ""


# JSON objects ---------------------------------------------------------------------------------------------------


def _is_object(line: str) -> bool:
    try:
        parse_object(line, strict=False)
    except ValueError:
        return False
    return True


def _json_row(number: int, line: str, task: Task) -> Row:
    try:
        record = parse_object(line, strict=False)
    except ValueError as error:
        return Row(number + 1, str(number), problem=str(error))
    known = columns_of(task)
    columns = next((each for each in known if {*each.texts} <= {*record}), known[0])
    label = next((each.label for each in (columns, *known) if each.label in record), columns.label)
    id_column = next((name for name in IDS if name in record), IDS[0])
    return row_of_record(number, record, Columns(columns.texts, label), id_column)


# Bare lines --------------------------------------------------------------------------------------------------------


def _bare_row(number: int, line: str, task: Task) -> Row:
    texts = line.split("\t") if line.strip() else [""] * len(task.text)
    row = Row(number + 1, str(number), texts=texts)
    if "\0" in line:
        return row._replace(problem="a NUL character (is the file UTF-16? convert it to UTF-8)")
    if len(texts) != len(task.text):
        expected = "a pair of sentences separated by a tab" if task.is_pair else "a sentence without tabs"
        count = "1 field" if len(texts) == 1 else f"{len(texts)} fields"
        return row._replace(problem=f"expected {expected}, got {count}")
    return row


def _refuse_other_delimiters(where: str, line: str, task: Task) -> None:
    """Refuse a header with another delimiter than tabs, which would be read as a bare line."""
    for delimiter in (",", ";", "|"):
        names = [name.strip().strip('"') for name in line.split(delimiter)]
        if len(names) > 1 and all(re.fullmatch(r"\w*", name) for name in names) and _is_header(names, task):
            raise UserError(f"{where}: a header separated by {delimiter!r}; expected columns separated by tabs")
