"""Records and files of a user's own tasks."""

from __future__ import annotations

import json
from pathlib import Path

from minbert.tasks import Task, parse_tasks


def own_task(directory: Path, name: str = "topics", **values: object) -> Task:
    """The record of a task of texts `message` and labels `topic`, as a tasks file in the directory has it."""
    record = {"text": "message", "label": "topic", "type": "classification", "train": "train.csv", "dev": 0.5, **values}
    lines = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in record.items() if value is not None)
    return parse_tasks(f"tasks:\n  {name}:\n{lines}", "tasks.yaml", directory)[name]
