"""Rows of an input that are left out: how they are named on the terminal, and the file that lists all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minbert.data.lines import short
from minbert.errors import UserError, one_line
from minbert.files import json_yaml
from minbert.files import validation as records
from minbert.files.atomic import write_atomically

SHOWN = 5  # rows of a file that a command names on the terminal


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: its file, its line (from 1, counting the header), why, and its id where it has one."""

    file: str
    line: int
    reason: str
    id: str = field(default="", compare=False)  # file and line say which row it is

    def __str__(self) -> str:
        identity = f", id {one_line(short(self.id))}" if self.id else ""
        return f"line {self.line}{identity}: {self.reason}"


def skipped_lines(skipped: Sequence[Skipped], rest: str) -> list[str]:
    """Lines for the terminal: how many rows of each file were left out, the first few of them, and where the rest are.

    Args:
        rest: where all of them are listed.
    """
    by_file: dict[str, list[Skipped]] = {}
    for row in skipped:
        by_file.setdefault(row.file, []).append(row)
    lines = []
    for file, rows in by_file.items():
        count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
        lines.append(f"warning: {count} of {one_line(file)} left out:")
        lines += [f"  {row}" for row in rows[:SHOWN]]
        if len(rows) > SHOWN:
            lines.append(f"  and {len(rows) - SHOWN} more: {rest}")
    return lines


def refuse_skipped(skipped: Sequence[Skipped]) -> None:
    """What --strict does: raise a UserError if a row was left out."""
    if skipped:
        count = "1 row" if len(skipped) == 1 else f"{len(skipped)} rows, the first"
        raise UserError(f"--strict: {count} cannot be used: {skipped[0].file}, {skipped[0]}")


@dataclass(frozen=True)
class SkippedRow:
    """A line of a list of rows that were left out."""

    split: str
    task: str
    file: str
    line: int
    id: str
    reason: str


def skipped_rows(split: str, task: str, skipped: Sequence[Skipped]) -> list[SkippedRow]:
    return [
        SkippedRow(split, task, one_line(row.file), row.line, one_line(short(row.id, 200)), short(row.reason, 1000))
        for row in skipped
    ]


def write_skipped(path: Path, rows: Sequence[SkippedRow]) -> None:
    """List the rows in a file, a JSON object on each line, those of train first; without any, there is no file."""
    rows = sorted(rows, key=lambda row: (row.split != "train", row.split, row.task, row.file, row.line))
    if rows:
        write_atomically(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
    else:
        path.unlink(missing_ok=True)


def update_skipped(path: Path, split: str, files: Collection[tuple[str, str]], rows: Sequence[SkippedRow]) -> None:
    """Replace what a list has of some files of a split.

    Args:
        files: tasks, and the file of each that was read.
        rows: those of the files that were left out.
    """
    read = {(task, os.path.realpath(file)) for task, file in files}
    listed = read_skipped(path)
    kept = [row for row in listed if row.split != split or (row.task, os.path.realpath(row.file)) not in read]
    write_skipped(path, [*kept, *rows])


def read_skipped(path: Path) -> list[SkippedRow]:
    """The rows that a list names; none where there is no list.

    Raises:
        UserError: the list is damaged.
    """
    if not os.path.lexists(path):
        return []
    remedy = "delete the file and evaluate the run again"
    rows = []
    for number, found in json_yaml.read_lines(path, remedy):
        where = f"{path}, line {number}"
        if isinstance(found, ValueError):
            raise UserError(f"{where}: damaged ({found}); {remedy}")
        rows.append(records.build(SkippedRow, found, where))
    return rows
