"""The built-in tasks, whose records are in `builtin.yaml`, and tasks by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from minbert.errors import UserError, did_you_mean
from minbert.tasks.task import Task
from minbert.tasks.tasks_file import parse_tasks

_FILE = Path(__file__).with_name("builtin.yaml")
TASKS: dict[str, Task] = parse_tasks(_FILE.read_text(encoding="utf-8"), _FILE.name, _FILE.parent, built_in=True)


def find_tasks(names: Sequence[str], known: Mapping[str, Task] = TASKS) -> list[Task]:
    """The records of the named tasks, in that order, and after them those of their further dev sets (`head_of`).

    Raises:
        UserError: an unknown name, the same name twice, or no name.
    """
    for name in names:
        if name not in known:
            raise UserError(f"unknown task {name!r}{did_you_mean(name, list(known))}; known: {', '.join(known)}")
    if not names or len(set(names)) != len(names):
        raise UserError(f"tasks must be one or more different names, got {list(names)}; known: {', '.join(known)}")
    further = [task for task in known.values() if task.head_of in names and known[task.head_of].glue]
    return [*(known[name] for name in names), *(task for task in further if task.name not in names)]
