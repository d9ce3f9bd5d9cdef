"""What is exported: a checkpoint's model with its tokenizer, and sentences to compare its outputs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minbert.config import TrainConfig
from minbert.data import Encoded, Examples, demo, encode
from minbert.data.tokenizer import Tokenizer
from minbert.errors import UserError
from minbert.inference import head_outputs, prepared
from minbert.model import MultitaskModel, pair_encoding
from minbert.runs.run_directory import Run
from minbert.tasks import Task

CPU = torch.device("cpu")
MOST_SENTENCES = 200  # that are compared, of each task
TOLERANCE = 1e-4  # of outputs, probabilities and the numbers of vectors


@dataclass(frozen=True)
class Trained:
    """A checkpoint in float32.

    Args:
        tasks: those to export, with the classes and thresholds of the checkpoint.
        max_length: of a sequence in tokens.
    """

    model: MultitaskModel
    tokenizer: Tokenizer
    tasks: Sequence[Task]
    max_length: int

    def encoded(self, task: Task, examples: Examples) -> Encoded:
        return encode(examples, self.tokenizer, self.max_length, pair_encoding=pair_encoding(task), cached=False)

    def outputs(self, task: Task, examples: Examples) -> np.ndarray:
        """minbert's outputs for examples, float32 [n, C] or [n]."""
        with prepared(self.model):
            return head_outputs(self.model, task, self.encoded(task, examples), CPU)


@dataclass(frozen=True)
class Agreement:
    """How far an exported model is from minbert.

    Args:
        largest: difference of any two numbers.
        accepted: what it may be.
        equal: predicted labels that are equal; None for a task without classes, and for vectors.
        of: examples that were compared.
    """

    largest: float
    accepted: float
    equal: int | None
    of: int

    def __str__(self) -> str:
        labels = "" if self.equal is None else f"; {self.equal} of {self.of} labels are equal"
        return f"differs from minbert by {self.largest:.1e} at most ({self.accepted:.0e} is accepted){labels}"


def agreement(found: np.ndarray, expected: np.ndarray, equal: int | None = None, *, unit: float = 1.0) -> Agreement:
    """The agreement of numbers [n, ...] with minbert's.

    Args:
        equal: the predicted labels that are equal, if there are some.
        unit: of the numbers, by which the tolerance is multiplied.
    """
    difference = np.abs(found.astype(np.float64) - expected)
    largest = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    return Agreement(largest, TOLERANCE * unit, equal, len(expected))


def dev_examples(
    run: Run, config: TrainConfig, tasks: Sequence[Task], data: str | None, tasks_file: str | None
) -> tuple[str, dict[str, Examples]]:
    """The name of the data, and the dev examples of tasks by name.

    Args:
        data, tasks_file: where they are; by default where the run's were.

    Raises:
        UserError: they cannot be read, or there are none of a task.
    """
    source = run.source(config, data, tasks_file, own_dev=(data, tasks_file) == (None, None))
    return source.name, {task.name: source.load(task, "dev") for task in tasks}


def built_in_examples(task: Task) -> Examples:
    """Sentences, or pairs of them, of the demo corpus."""
    return demo.examples("sts" if task.is_pair else "sst", "dev")


def some_of(examples: Examples) -> Examples:
    """As many of the examples as are compared, evenly spread, without their labels."""
    count = min(len(examples), MOST_SENTENCES)
    chosen = examples.select(np.linspace(0, len(examples) - 1, count).astype(np.int64))
    return Examples(chosen.ids, chosen.texts, chosen.pairs, None)


def only_task(trained: Trained, kind: str) -> Task:
    """The task of a model that can have one only.

    Raises:
        UserError: there are several.
    """
    if len(trained.tasks) > 1:
        names = ", ".join(task.name for task in trained.tasks)
        raise UserError(f"a {kind} has one task, and the run has {names}; give --task NAME")
    return trained.tasks[0]
