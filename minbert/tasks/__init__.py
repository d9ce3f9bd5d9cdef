"""The tasks: what one is, the built-in ones, and how predictions become scores."""

from minbert.tasks.builtin import TASKS, find_tasks
from minbert.tasks.task import PAIR_ENCODINGS, Glue, Task

__all__ = ["PAIR_ENCODINGS", "TASKS", "Glue", "Task", "find_tasks"]
