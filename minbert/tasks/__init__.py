"""The record of a task, the built-in tasks, tasks files, labels, and predictions and metrics."""

from minbert.tasks.builtin import TASKS, find_tasks
from minbert.tasks.pair_encoding import PAIR_ENCODINGS
from minbert.tasks.task import Course, Glue, Task
from minbert.tasks.tasks_file import parse_tasks, read_tasks, tasks_to_yaml

__all__ = [
    "PAIR_ENCODINGS",
    "TASKS",
    "Course",
    "Glue",
    "Task",
    "find_tasks",
    "parse_tasks",
    "read_tasks",
    "tasks_to_yaml",
]
