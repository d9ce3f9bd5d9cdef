"""Rows of an input that have no output: their record, and how they are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minbert.data.lines import short
from minbert.errors import one_line

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
