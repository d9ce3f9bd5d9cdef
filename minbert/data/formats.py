r"""Readers of file formats: tables with a header as CS224N and GLUE write them, JSON objects on lines, and bare lines.

Training, evaluating, predicting and augmenting read a file with `read_file` or `read_rows`. Which format a file is in
follows from its name and its first line that is not blank:

1. JSON objects on lines, where the name ends in .json, .jsonl or .ndjson, or the line is a JSON object.
2. A table, where the line names a text column of the task, as CS224N or as GLUE calls it. In a .tsv file of a task that
   GLUE has, fields are separated by tabs and nothing else (GLUE's files); in a .csv file they are quoted as CSV as
   well (the course's files), as are those of a task that GLUE does not have. Under any other name a table is GLUE's if
   its header has GLUE's names and not the course's, or an `index` and no `id`.
3. Bare lines, where the caller takes them: a sentence, or a pair separated by a tab, on each; nothing is quoted.

Lines end with `\n` or `\r\n` alone, and each is one row. Columns are found by name. One level of quoting is undone, and
whitespace around fields is stripped. A quoted field ends on its own line, so that an unbalanced quote costs one row and
not all that follow; quotes inside it (the course's files were quoted several times over) stay in the text.

Blank lines are no rows in a table of several columns and between JSON objects; in a table of one column and among bare
lines, a blank line is an empty text. A row without an id goes by its number, from 0: that of its line for JSON and bare
lines, that of its line below the header in a table. A bad row is left out and noted with its line, its id and the
reason; a bad file is a `UserError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from minbert.data.examples import Columns, Examples, Labels, Row, collect, record_row
from minbert.data.lines import json_object, read_lines, short, split_quoted
from minbert.errors import UserError, one_line
from minbert.tasks import Task

JSON_NAMES = (".json", ".jsonl", ".ndjson")
IDS = ("id", "index")  # columns of ids, the first that is there
Split = Callable[[str], tuple[list[str], str]]


def read_file(
    path: str | Path, task: Task, *, labels: Labels = "optional", bare: bool = False, option: str = ""
) -> Examples:
    """Read a file in the format that its name and its first line say.

    Args:
        path: the file. With `bare` also a pipe, or `-` for standard input.
        task: whose columns and labels to expect.
        labels: whether every row must have a label, whether they are read if some row has one (else `labels` is None),
            or are not looked at.
        bare: whether a file without a header may be bare lines.
        option: the option that named the file, for messages.

    Raises:
        UserError: the file cannot be read, is empty, is not UTF-8, lacks a column, or has no usable row.
    """
    named = "standard input" if bare and str(path) == "-" else str(path)
    return collect(named, read_rows(path, task, labels=labels, bare=bare, option=option), task, labels)


def read_examples(path: str | Path, task: Task, *, labels: Labels = "optional") -> Examples:
    """Read a table as the course writes it, whatever its name: as `read_file`, with fields quoted as CSV."""
    return collect(str(path), read_rows(path, task, labels=labels, quoted=True), task, labels)


def read_glue(path: str | Path, task: Task, *, labels: Labels = "optional") -> Examples:
    """Read a table as GLUE writes it, whatever its name: as `read_file`, without quoting."""
    return collect(str(path), read_rows(path, task, labels=labels, quoted=False), task, labels)


def read_rows(
    path: str | Path,
    task: Task,
    *,
    labels: Labels = "optional",
    bare: bool = False,
    quoted: bool | None = None,
    option: str = "",
) -> Iterable[Row]:
    """The rows of a file in the format that its name and its first line say.

    Args:
        quoted: the file is a table, with quoted fields or without.

    Raises:
        UserError: the file cannot be read, is empty, is not UTF-8, or lacks a column.
    """
    shape = f"{'pair of sentences separated by a tab' if task.is_pair else 'sentence'} per line"
    expected = f"a header and rows, or a {shape}" if bare else "a tab-separated file"
    lines = list(read_lines(path, expected, option=option, pipes=bare))
    start = next((number for number, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise UserError(
            f"{f'{option} ' if option else ''}{path} is empty; expected a {shape if bare else 'header and rows'}"
        )
    if quoted is None and (Path(path).suffix.lower() in JSON_NAMES or _is_object(lines[start])):
        return (_json_row(number, line, task) for number, line in enumerate(lines) if line.strip())
    where = f"{'standard input' if bare and str(path) == '-' else path}, line {start + 1}"
    names = _names(lines[start])
    if not _is_header(names, task):
        _refuse_other_delimiters(where, lines[start], task)
    if bare and not _is_header(names, task):
        return (_bare_row(number, line, task) for number, line in enumerate(lines))
    if quoted is None:
        quoted = not _is_glue(Path(path).suffix.lower(), names, task)
    if quoted and split_quoted(lines[start])[1]:
        raise UserError(f"{where}: cannot read the header: {split_quoted(lines[start])[1]}")
    columns = _columns(where, names, task, quoted, labels)
    return _table_rows(names, columns, split_quoted if quoted else _split_plain, lines, start)


# Tables ------------------------------------------------------------------------------------------------------------


def _names(line: str) -> list[str]:
    """The fields of a header, with quotes undone in either kind of table."""
    fields, problem = split_quoted(line)
    return [name.strip() for name in (_split_plain(line)[0] if problem else fields)]


def _columns_of(task: Task) -> list[Columns]:
    """What the course and GLUE call a task's columns."""
    own = Columns(task.columns, task.label)
    return [own, Columns(task.glue.columns, task.glue.label)] if task.glue else [own]


def _is_header(names: Sequence[str], task: Task) -> bool:
    """Whether a first line that may be a bare line is a header: it names a text column, or ids and something else."""
    known = {name for columns in _columns_of(task) for name in columns.texts}
    return not known.isdisjoint(names) or (len(names) > 1 and not {*IDS}.isdisjoint(names))


def _is_glue(suffix: str, names: Sequence[str], task: Task) -> bool:
    """Whether a table is GLUE's, with nothing quoted."""
    if task.glue is None or suffix in (".tsv", ".csv"):
        return task.glue is not None and suffix == ".tsv"
    if not task.files:
        return True
    return {*task.glue.columns} <= {*names} and (
        not {*task.columns} <= {*names} or ("index" in names and "id" not in names)
    )


def _columns(where: str, names: Sequence[str], task: Task, quoted: bool, labels: Labels) -> Columns:
    """The columns of a table that hold the task's texts and its label; no label where it need not be there and is not.

    Raises:
        UserError: a column is not there, or is there twice.
    """
    known = _columns_of(task)[:: 1 if quoted else -1]
    columns = next((columns for columns in known if {*columns.texts} <= {*names}), known[0])
    label = next((each.label for each in (columns, *known) if each.label in names), "")
    if labels == "ignored" or (labels == "optional" and not label):
        label = ""
    elif not label:
        label = columns.label
    for name in filter(None, (*columns.texts, label)):
        if name not in names:
            found = ", ".join(one_line(short(other)) for other in names if other) or "no names"
            raise UserError(f"{where}: no column {name!r} in the header; found {short(found, 200)}")
    for name in filter(None, (*IDS, *columns.texts, label)):
        if names.count(name) > 1:
            raise UserError(f"{where}: the header has the column {name!r} twice; expected one")
    return Columns(columns.texts, label)


def _table_rows(
    names: Sequence[str], columns: Columns, split: Split, lines: Sequence[str], start: int
) -> Iterator[Row]:
    """The rows under the header, which is line number `start`, from 0."""
    texts = [names.index(name) for name in columns.texts]
    label = names.index(columns.label) if columns.label else None
    identity = next((names.index(name) for name in IDS if name in names), None)
    for number, line in enumerate(lines[start + 1 :]):
        if len(names) > 1 and not line.strip() and "\t" not in line:
            continue
        fields, problem = split(line)
        if not problem and "\0" in line:
            problem = "a NUL character (is the file UTF-16? convert it to UTF-8)"
        elif not problem and len(fields) != len(names):
            problem = f"expected {len(names)} fields, found {len(fields)}"
        own = fields[identity].strip() if identity is not None and identity < len(fields) else ""
        row = Row(start + number + 2, "" if problem and identity is not None else str(number), own, problem=problem)
        if not problem:
            row = row._replace(texts=[fields[index] for index in texts], label="" if label is None else fields[label])
        yield row


def _split_plain(line: str) -> tuple[list[str], str]:
    return line.split("\t"), ""


# JSON objects, and other records ------------------------------------------------------------------------------------


def _is_object(line: str) -> bool:
    try:
        json_object(line)
    except ValueError:
        return False
    return True


def _json_row(number: int, line: str, task: Task) -> Row:
    try:
        record = json_object(line)
    except ValueError as error:
        return Row(number + 1, str(number), problem=str(error))
    known = _columns_of(task)
    columns = next((each for each in known if {*each.texts} <= {*record}), known[0])
    label = next((each.label for each in (columns, *known) if each.label in record), columns.label)
    identity = next((name for name in IDS if name in record), IDS[0])
    return record_row(number, record, Columns(columns.texts, label), identity)


# Bare lines --------------------------------------------------------------------------------------------------------


def _bare_row(number: int, line: str, task: Task) -> Row:
    texts = line.split("\t") if line.strip() else [""] * len(task.columns)
    row = Row(number + 1, str(number), texts=texts)
    if "\0" in line:
        return row._replace(problem="a NUL character (is the file UTF-16? convert it to UTF-8)")
    if len(texts) != len(task.columns):
        expected = "a pair of sentences separated by a tab" if task.is_pair else "a sentence without tabs"
        count = "1 field" if len(texts) == 1 else f"{len(texts)} fields"
        return row._replace(problem=f"expected {expected}, got {count}")
    return row


def _refuse_other_delimiters(where: str, line: str, task: Task) -> None:
    """Refuse a header in which something else stands where tabs should: among bare lines it would be a sentence."""
    for delimiter in (",", ";", "|"):
        names = [name.strip().strip('"') for name in line.split(delimiter)]
        if len(names) > 1 and all(re.fullmatch(r"\w*", name) for name in names) and _is_header(names, task):
            raise UserError(f"{where}: a header separated by {delimiter!r}; expected columns separated by tabs")
