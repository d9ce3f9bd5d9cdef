"""The record of a task, the built-in tasks, and their predictions and metrics."""

from minbert.tasks.builtin import TASKS, find_tasks
from minbert.tasks.pair_encoding import PAIR_ENCODINGS
from minbert.tasks.task import Glue, Task

__all__ = ["PAIR_ENCODINGS", "TASKS", "Glue", "Task", "find_tasks"]
