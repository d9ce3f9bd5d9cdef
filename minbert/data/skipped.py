"""Skipped rows of an input: their lines on the terminal, and the file that lists all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minbert.data.line_reader import shorten
from minbert.errors import UserError, one_line
from minbert.files.atomic import write_atomically
from minbert.files.json_yaml import read_json_lines
from minbert.files.schema_checks import build

SHOWN = 5  # rows of a file that a command names on the terminal


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used: its file, its line (from 1, with the header), the reason, and its id if it has one."""

    file: str
    line: int
    reason: str
    id: str = field(default="", compare=False)  # file and line identify the row

    def __str__(self) -> str:
        identity = f", id {one_line(shorten(self.id))}" if self.id else ""
        return f"line {self.line}{identity}: {self.reason}"


def skipped_lines(skipped: Sequence[Skipped], rest: str) -> list[str]:
    """Lines for the terminal: each file's number of skipped rows, the first few of them, and where to find the rest.

    Args:
        rest: the list of all of them.
    """
    by_file: dict[str, list[Skipped]] = {}
    for row in skipped:
        by_file.setdefault(row.file, []).append(row)
    return [line for rows in by_file.values() for line in skipped_lines_of_file(len(rows), rows[:SHOWN], rest)]


def skipped_lines_of_file(count: int, first: Sequence[Skipped], rest: str) -> list[str]:
    """`skipped_lines` of one file, of whose skipped rows the first few are given."""
    if not first:
        return []
    rows = "1 row" if count == 1 else f"{count} rows"
    lines = [f"warning: {rows} of {one_line(first[0].file)} left out:", *(f"  {row}" for row in first)]
    return [*lines, f"  and {count - len(first)} more: {rest}"] if count > len(first) else lines


def refuse_skipped(skipped: Sequence[Skipped]) -> None:
    """Raise a UserError if a row was skipped, for --strict."""
    if skipped:
        count = "1 row" if len(skipped) == 1 else f"{len(skipped)} rows, the first"
        raise UserError(f"--strict: {count} cannot be used: {skipped[0].file}, {skipped[0]}")


@dataclass(frozen=True)
class SkippedRow:
    """A line of a list of skipped rows."""

    split: str
    task: str
    file: str
    line: int
    id: str
    reason: str


def skipped_rows(split: str, task: str, skipped: Sequence[Skipped]) -> list[SkippedRow]:
    return [
        SkippedRow(split, task, one_line(row.file), row.line, one_line(shorten(row.id, 200)), shorten(row.reason, 1000))
        for row in skipped
    ]


def format_skipped(row: SkippedRow) -> str:
    """A row as a line of a list."""
    return json.dumps(asdict(row)) + "\n"


def write_skipped(path: Path, rows: Sequence[SkippedRow]) -> None:
    """Write the rows to a file of JSON lines, those of train first; remove the file if there are none."""
    rows = sorted(rows, key=lambda row: (row.split != "train", row.split, row.task, row.file, row.line))
    if rows:
        write_atomically(path, "".join(map(format_skipped, rows)))
    else:
        path.unlink(missing_ok=True)


def update_skipped(path: Path, split: str, files: Collection[tuple[str, str]], rows: Sequence[SkippedRow]) -> None:
    """Replace the rows of some files of a split in a list.

    Args:
        files: pairs of a task and its file.
        rows: the files' skipped rows.
    """
    read = {(task, os.path.realpath(file)) for task, file in files}
    listed = read_skipped(path)
    kept = [row for row in listed if row.split != split or (row.task, os.path.realpath(row.file)) not in read]
    write_skipped(path, [*kept, *rows])


def read_skipped(path: Path) -> list[SkippedRow]:
    """The rows of a list; none if there is no list.

    Raises:
        UserError: the list is damaged.
    """
    if not os.path.lexists(path):
        return []
    remedy = "delete the file and evaluate the run again"
    rows = []
    for number, found in read_json_lines(path, remedy):
        where = f"{path}, line {number}"
        if isinstance(found, ValueError):
            raise UserError(f"{where}: damaged ({found}); {remedy}")
        rows.append(build(SkippedRow, found, where))
    return rows
