"""The formats of users' files: by the name, and named if the content is another one.

`.csv` (RFC 4180), `.tsv`, JSON objects on lines (`.jsonl`, `.json`, `.ndjson`), `.parquet`, a directory that
`datasets` saved, and `hub:NAME/CONFIG/SPLIT`. Every reader yields rows one by one, so a file may be larger than memory.
A bad row is one row's problem; a file that cannot be read as what it is named is a `UserError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minbert.data import columnar_files
from minbert.data.delimited_files import (
    NUL,
    csv_rows,
    first_line,
    lines_of,
    names_of_table,
    opened,
    tsv_rows,
)
from minbert.data.examples import Labels, Row
from minbert.data.own_columns import OwnFile, id_column, listed
from minbert.errors import UserError, did_you_mean, one_line
from minbert.files.json_yaml import parse_object
from minbert.tasks import Task
from minbert.tasks.tasks_file import HUB

__all__ = ["NUL", "SUFFIXES", "is_own_format", "read_own_rows"]

FORMATS = {
    ".csv": "CSV",
    ".tsv": "TSV",
    ".jsonl": "JSON lines",
    ".json": "JSON lines",
    ".ndjson": "JSON lines",
    ".parquet": "Parquet",
}
SUFFIXES = tuple(FORMATS)
BINARY = {  # the first bytes of formats
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file: unpack it",
    b"BZh": "a bzip2 file: unpack it",
    b"\xfd7zXZ": "an xz file: unpack it",
    b"(\xb5/\xfd": "a zstandard file: unpack it",
    b"PK\x03\x04": "a zip or Excel file: unpack it, or save the sheet as CSV",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8",
}


def is_own_format(file: str) -> bool:
    """Whether `read_own_rows` reads it, by its name."""
    return file.startswith(HUB) or Path(file).suffix.lower() in FORMATS or Path(file).is_dir()


def read_own_rows(
    file: str, task: Task, labels: Labels, split: str = "", option: str = ""
) -> tuple[Iterator[Row], str]:
    """The rows of a user's file, and what their `line` counts: line or row.

    Args:
        file: a file, a directory of `datasets`, or a name on the hub.
        task: the task of its columns and its delimiter.
        labels: whether the label column must be there, may be there, or is not read.
        split: train, dev or test: which one to take of a directory with several.
        option: what named the file, for messages.

    Raises:
        UserError: the file cannot be read, is of another format than its name says, or lacks a column; some of it
            when the rows are read.
    """
    named = f"{option} {one_line(file)}" if option else one_line(file)
    if file.startswith(HUB):
        return columnar_files.hub_rows(file, OwnFile(Path(), named, task, labels)), "row"
    own = OwnFile(Path(file), named, task, labels)
    if own.path.is_dir():
        return columnar_files.directory_rows(own, split), "row"
    kind = FORMATS.get(own.path.suffix.lower(), "")
    if not kind and own.path.exists():
        raise UserError(
            f"{named}: its name ends in none of {', '.join(FORMATS)}; give it the ending of its format, or a directory"
            " of datasets, or hub:NAME/CONFIG/SPLIT"
        )
    _refuse_other_format(own, kind)
    if kind == "Parquet":
        return columnar_files.parquet_rows(own), "row"
    readers = {"CSV": csv_rows, "TSV": tsv_rows, "JSON lines": _json_rows}
    return readers[kind](own), "line"


def _refuse_other_format(file: OwnFile, kind: str) -> None:
    """Refuse a file whose first bytes are of another format than its name says."""
    with opened(file, newline="\n") as text:
        start = text.buffer.read(16)
    found = next((name for magic, name in BINARY.items() if start.startswith(magic)), "")
    if kind == "Parquet":
        if start[:4] != b"PAR1":
            what = found or ("empty" if not start else "another format")
            raise UserError(f"{file.named}: not a Parquet file, as its name says, but {what}")
    elif found:
        remedy = "" if ":" in found else "; give it a name that ends in .parquet"
        raise UserError(f"{file.named}: not {kind}, as its name says, but {found}{remedy}")


def _json_rows(file: OwnFile) -> Iterator[Row]:
    number, line = first_line(file)
    where = f"{file.named}, line {number}"
    if not line:
        raise UserError(f"{file.named} is empty; expected a JSON object on each line")
    if line.lstrip().startswith("["):
        raise UserError(f"{where}: a JSON list; write each object on a line of its own (JSON lines)")
    if line.strip() == "{":
        raise UserError(f"{where}: a JSON object over several lines; write each object on one line (JSON lines)")
    delimiter = "" if line.lstrip().startswith("{") else names_of_table(line, file.task.text)
    if delimiter:
        suffix = ".tsv" if delimiter == "\t" else ".csv"
        raise UserError(f"{where}: a table's header, not a JSON object; give the file a name that ends in {suffix}")
    with opened(file, newline="\n") as text:
        index = -1
        for number, line in enumerate(lines_of(file, text), 1):
            if line.strip():
                index += 1
                yield _json_row(file, number, str(index), line)


def _json_row(file: OwnFile, line: int, number: str, content: str) -> Row:
    task = file.task
    try:
        record = parse_object(content, strict=False)
    except ValueError as error:
        return Row(line, number, problem=str(error))
    value = record.get(id_column(task))
    identity = str(value) if isinstance(value, str | int | float) else ""
    needed = [*task.text, *([task.label] if file.labels == "required" else [])]
    if task.id:
        needed.append(task.id)
    for name in needed:
        if name not in record:
            found = listed(list(record))
            return Row(line, number, identity, problem=f"no {name!r}{did_you_mean(name, list(record))}; found {found}")
    label = None if file.labels == "ignored" else record.get(task.label)
    return Row(line, number, identity, [record[name] for name in task.text], label)
