"""What a source of examples does."""

from __future__ import annotations

from typing import Protocol

from minbert.data.examples import Examples
from minbert.tasks import Task

SPLITS = ("train", "dev", "test")


class Source(Protocol):
    """Examples of some tasks, in splits train, dev and test."""

    name: str

    def tasks(self) -> list[str]:
        """Names of the tasks that have a train split."""

    def splits(self, task: Task) -> list[str]:
        """The splits that `task` has here, in the order train, dev, test."""

    def complete(self, task: Task) -> Task:
        """The task with its classes, which may be those of its training file.

        Raises:
            UserError: the training file is bad, or its labels are no classes.
        """

    def load(self, task: Task, split: str) -> Examples:
        """Read one split of a complete task; train and dev have labels, test may lack them.

        Raises:
            UserError: the split is missing, or its file is bad.
        """

    def warnings(self, task: Task) -> list[str]:
        """What is odd about the splits of a complete task that were read, a line each."""
