"""CSV and TSV files of users: RFC 4180, with quoted line breaks and any delimiter."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from minbert.data.examples import Row
from minbert.data.line_reader import LONGEST_LINE
from minbert.data.own_columns import Found, OwnFile, find_columns
from minbert.errors import UserError
from minbert.files.json_yaml import is_unicode, parse_object

NUL = "\udc00"  # stands for a NUL character, which Python 3.10's csv does not read; no UTF-8 text holds it
DELIMITERS = (",", ";", "\t", "|")
UNBALANCED = (
    "cannot split its fields (a quote is not closed, or has text after it); is a quote unbalanced? A quote inside a"
    ' quoted field is written ""'
)


@contextmanager
def opened(file: OwnFile, newline: str) -> Iterator[TextIO]:
    """A text file. Bytes that are not UTF-8 become lone surrogates: they are the problem of their own row."""
    try:
        if file.path.exists() and not file.path.is_file():
            raise OSError(0, "not a regular file")
        with open(file.path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text:
            yield text
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        raise UserError(f"{file.named} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def lines_of(file: OwnFile, text: TextIO) -> Iterator[str]:
    """The lines with their ends; NUL characters are replaced.

    Raises:
        UserError: a line is too long.
    """
    for number, line in enumerate(iter(lambda: text.readline(LONGEST_LINE + 1), ""), 1):
        if len(line) > LONGEST_LINE:
            raise UserError(f"{file.named}, line {number}: longer than {LONGEST_LINE >> 20} Mi characters")
        yield line.replace("\0", NUL) if "\0" in line else line


def csv_rows(file: OwnFile) -> Iterator[Row]:
    """The rows of a CSV file, one by one.

    Raises:
        UserError: the header lacks a column, or a quote is unbalanced.
    """
    delimiter = file.task.delimiter
    with opened(file, newline="") as text, _long_fields():
        yield from _rows(file, _records(file, text, delimiter), delimiter)


def tsv_rows(file: OwnFile) -> Iterator[Row]:
    """The rows of a TSV file: with quoted fields as in CSV if it can be read so, else quotes are text.

    Raises:
        UserError: the header lacks a column, or a quote is unbalanced in a file of quoted fields.
    """
    quoted = _is_quoted(file)
    with opened(file, newline="" if quoted else "\n") as text, _long_fields():
        records = _records(file, text, "\t") if quoted else _plain_records(file, text)
        yield from _rows(file, records, "\t")


def _records(file: OwnFile, text: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line on which each record begins, and its fields; none in a blank line."""
    reader = csv.reader(lines_of(file, text), delimiter=delimiter, strict=True)
    line = 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error:
        raise UserError(f"{file.named}, line {line}: {UNBALANCED}") from None


def _plain_records(file: OwnFile, text: TextIO) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines_of(file, text), 1):
        content = line.removesuffix("\n").removesuffix("\r")
        yield number, content.split("\t") if content else []


def _is_quoted(file: OwnFile) -> bool:
    """Whether a TSV file quotes fields.

    It does if it can be read as CSV with fewer rows of another number of fields than the header's than without quotes,
    or with as few and as many rows: quotes that join two whole lines are text. It also does if half its rows have a
    field between quotes; one that cannot be read as CSV has an unbalanced quote then.
    """
    with opened(file, newline="\n") as text:
        plain_others, rows, wrapped = _other_widths(fields for _, fields in _plain_records(file, text))
    with opened(file, newline="") as text, _long_fields():
        try:
            others, quoted_rows, _ = _other_widths(fields for _, fields in _records(file, text, "\t"))
        except UserError:
            return 2 * wrapped >= rows
        return others < plain_others or (others == plain_others and (quoted_rows == rows or 2 * wrapped >= rows))


def _other_widths(records: Iterator[list[str]]) -> tuple[int, int, int]:
    """Rows of another number of fields than the first; all rows; rows with a field between quotes."""
    others = rows = wrapped = width = 0
    for fields in records:
        if fields:
            rows += 1
            width = width or len(fields)
            others += len(fields) != width
            wrapped += any(len(field) > 1 and field[0] == field[-1] == '"' for field in fields)
    return others, rows, wrapped


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let csv read long texts: its limit guards against unbalanced quotes, as `lines_of` and `strict` do."""
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows(file: OwnFile, records: Iterator[tuple[int, list[str]]], delimiter: str) -> Iterator[Row]:
    line, names = next((record for record in records if any(map(str.strip, record[1]))), (1, []))
    if not names:
        raise UserError(f"{file.named} is empty; expected a header and rows")
    columns = _find(file, line, names, delimiter)
    texts, label, identity = columns
    width, number = len(names), -1
    for line, fields in records:
        if not fields and width > 1:
            continue
        number += 1
        if len(fields) == width or (width == 1 and not fields):
            fields = fields or [""]
            yield Row(
                line,
                str(number),
                "" if identity is None else fields[identity].strip(),
                [fields[text] for text in texts],
                "" if label is None else fields[label],
            )
        else:
            found = fields[identity].strip() if identity is not None and identity < len(fields) else ""
            problem = f"expected {width} fields, found {len(fields)}"
            if len(fields) > width and delimiter != "\t":
                problem += f"; a text with {delimiter!r} in it needs quotes"
            yield Row(line, str(number), found, problem=problem)


def _find(file: OwnFile, line: int, names: list[str], delimiter: str) -> Found:
    """The columns in a header.

    Raises:
        UserError: a column is missing; if another delimiter separates the header's names, the message says which.
    """
    where = f"{file.named}, line {line}"
    header = delimiter.join(names)
    if NUL in header or not is_unicode(header):
        what = "a NUL character (is the file UTF-16?)" if NUL in header else "not UTF-8 text"
        raise UserError(f"{where}: {what}; convert the file to UTF-8")
    try:
        return find_columns(where, names, file.task, file.labels)
    except UserError:
        _refuse_json(where, header)
        for other in DELIMITERS:
            found = [name.strip().strip('"') for name in header.split(other)]
            if other != delimiter and len(found) > 1 and any(text.strip() in found for text in file.task.text):
                raise UserError(f"{where}: {_separated(other, delimiter)}") from None
        raise


def _refuse_json(where: str, header: str) -> None:
    if header.lstrip().startswith(("{", "[")):
        try:
            parse_object(header, strict=False)
        except ValueError:
            return
        raise UserError(f"{where}: a JSON object, not the header of a table; give the file a name that ends in .jsonl")


def _separated(found: str, expected: str) -> str:
    shown = {"\t": "tabs"}
    text = f"its columns are separated by {shown.get(found, repr(found))}, not by {shown.get(expected, repr(expected))}"
    if expected == "\t":
        remedy = "" if found == "," else f' and give the task `delimiter: "{found}"`'
        return f"{text}; give the file a name that ends in .csv{remedy}"
    if found == "\t":
        return f"{text}; give the file a name that ends in .tsv"
    return f'{text}; give the task `delimiter: "{found}"`'


def names_of_table(line: str, texts: tuple[str, ...]) -> str:
    """The delimiter of a line that is the header of a table with one of the text columns, or ""."""
    for delimiter in DELIMITERS:
        names = [name.strip().strip('"') for name in line.split(delimiter)]
        if len(names) > 1 and not set(names).isdisjoint(texts):
            return delimiter
    return ""


def first_line(file: OwnFile) -> tuple[int, str]:
    """The first line that is not blank, and its number."""
    with opened(file, newline="\n") as text:
        numbered = enumerate(itertools.islice(lines_of(file, text), 1000), 1)
        return next(((number, line) for number, line in numbered if line.strip()), (1, ""))
