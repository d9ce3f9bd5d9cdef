"""The columns that a task reads of a user's file, and errors that name the file and what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minbert.data.examples import Labels
from minbert.data.line_reader import shorten
from minbert.errors import UserError, did_you_mean, one_line
from minbert.tasks import Task

DEFAULT_ID = "id"  # the column of the ids, if there is one


class OwnFile(NamedTuple):
    """A file to read, and what for."""

    path: Path
    named: str  # for messages: what named it, and the file
    task: Task
    labels: Labels


class Found(NamedTuple):
    """The positions of a task's columns among a file's."""

    texts: list[int]
    label: int | None
    id: int | None

    @property
    def all(self) -> list[int]:
        return [*self.texts, *(each for each in (self.label, self.id) if each is not None)]


def id_column(task: Task) -> str:
    """The column of the rows' ids: the task's, or else one of that name that is neither text nor label, if any."""
    return task.id or (DEFAULT_ID if DEFAULT_ID not in (*task.text, task.label) else "")


def find_columns(where: str, names: Sequence[str], task: Task, labels: Labels) -> Found:
    """Find the task's columns by name; spaces around a name in the file do not matter.

    Raises:
        UserError: a column is missing or is there twice.
    """

    def find(name: str, needed: bool = True) -> int | None:
        same = [number for number, each in enumerate(names) if each == name] or [
            number for number, each in enumerate(names) if each.strip() == name.strip()
        ]
        if len(same) > 1:
            raise UserError(f"{where}: the column {name!r} is there twice; expected one")
        if not same and needed:
            raise UserError(f"{where}: no column {name!r}{did_you_mean(name, list(names))}; found {listed(names)}")
        return same[0] if same else None

    texts = [find(name) for name in task.text]
    label = None if labels == "ignored" else find(task.label, labels == "required")
    named = id_column(task)
    identity = find(named, bool(task.id)) if named else None
    return Found([number for number in texts if number is not None], label, identity)


def listed(names: Sequence[str]) -> str:
    """The names of columns, for messages."""
    return shorten(", ".join(one_line(shorten(name)) or "''" for name in names), 200) or "no columns"
