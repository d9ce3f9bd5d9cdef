"""The tasks: what one is, the built-in ones, and how predictions become scores."""

from minbert.tasks.builtin import TASKS, find_tasks
from minbert.tasks.task import READINGS, Glue, Task

__all__ = ["READINGS", "TASKS", "Glue", "Task", "find_tasks"]
