"""Sampling of tasks and examples, as pure functions of the step: resuming a run needs nothing but its number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minbert.seeds import derive_seed

EpochLength = Literal["smallest", "largest", "each"] | int


@dataclass(frozen=True)
class TaskSampler:
    """Batches from an endless sequence of passes over `n` examples, each pass in a fresh random order.

    A batch may span two passes, so each has `batch_size` examples for any `n`.

    Raises:
        ValueError: no examples, or an empty batch.
    """

    n: int
    batch_size: int
    seed: int
    name: str  # the task's: tasks of equal size have different orders

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(f"expected n and batch_size of at least 1, got {self.n} and {self.batch_size}")

    def batch(self, i: int) -> np.ndarray:
        """Indices of batch i (from 0): positions [i * batch_size, (i + 1) * batch_size) of the sequence, int64."""
        position, end = i * self.batch_size, (i + 1) * self.batch_size
        parts = []
        while position < end:
            number, start = divmod(position, self.n)
            order = _permutation(self.n, derive_seed(self.seed, "pass", self.name, number))
            parts.append(order[start : start + end - position])
            position += len(parts[-1])
        return np.concatenate(parts)


@dataclass(frozen=True)
class Plan:
    """The tasks of each step of a run."""

    names: tuple[str, ...]
    epoch_steps: int
    steps: int
    task_of_step: np.ndarray | None = None  # [steps]: an index of `names`; None: all tasks are in every step

    def at(self, step: int) -> dict[str, int]:
        """The tasks of step `step` (from 0), each with its number of steps before this one."""
        if self.task_of_step is None:
            return dict.fromkeys(self.names, step)
        return {self.names[self.task_of_step[step]]: int(self._numbers[step])}

    def steps_of(self, name: str) -> int:
        """The number of the task's steps in the run."""
        return self.steps if self.task_of_step is None else int((self.task_of_step == self.names.index(name)).sum())

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        """[steps]: how many earlier steps have the same task."""
        assert self.task_of_step is not None
        numbers = np.empty(len(self.task_of_step), np.int64)
        for index in range(len(self.names)):
            steps = np.flatnonzero(self.task_of_step == index)
            numbers[steps] = np.arange(len(steps))
        return numbers


def plan(
    sizes: Mapping[str, int],
    batch_sizes: Mapping[str, int],
    *,
    order: str = "joint",
    length: EpochLength = "smallest",
    times: int = 1,
    weights: Mapping[str, float] | None = None,
    alphas: tuple[float, float] = (1.0, 1.0),
    seed: int = 0,
    epochs: int = 1,
    steps: int | None = None,
) -> Plan:
    """Plan a run from its options alone, so that a step's batches never depend on earlier steps.

    Args:
        sizes: examples of each task, in the tasks' order.
        batch_sizes: examples of each task in one of its steps.
        order: `joint`, where every step has all tasks, or a name in `ORDERS`.
        length, times: as for `epoch_counts`.
        weights: factors of each task's number of steps; 1 by default.
        alphas: exponent of the sizes in the first and in the last epoch, linear in between; for `proportional`.
        epochs: their number, unless `steps` is given.

    Raises:
        ValueError: an unknown order.
    """
    names = tuple(sizes)
    counts = epoch_counts([sizes[name] for name in names], [batch_sizes[name] for name in names], length, times)
    if order == "joint":
        return Plan(names, max(counts), steps or epochs * max(counts))
    if order not in ORDERS:
        raise ValueError(f"order must be 'joint' or one of {', '.join(ORDERS)}, got {order!r}")
    factors = [(weights or {}).get(name, 1.0) for name in names]
    counts = [max(1, round(count * factor)) for count, factor in zip(counts, factors, strict=True)]
    total = steps or epochs * sum(counts)
    epochs = -(-total // sum(counts))
    tasks = []
    for epoch in range(epochs):
        alpha = alphas[0] + (alphas[1] - alphas[0]) * epoch / max(1, epochs - 1)
        probabilities = np.array([factor * sizes[name] ** alpha for name, factor in zip(names, factors, strict=True)])
        tasks.append(
            ORDERS[order](np.array(counts), probabilities / probabilities.sum(), derive_seed(seed, "turns", epoch))
        )
    return Plan(names, sum(counts), total, np.concatenate(tasks)[:total])


def epoch_counts(sizes: Sequence[int], batch_sizes: Sequence[int], length: EpochLength, times: int = 1) -> list[int]:
    """Batches of each task in an epoch.

    Args:
        sizes: examples of each task.
        batch_sizes: examples in a batch of each task.
        length: the number of batches in a pass over the task with the fewest (`smallest`) or the most (`largest`), over
            each task (`each`), or this number.
        times: a factor of all of them (paper 004, section 4.5).
    """
    own = [-(-size // batch_size) for size, batch_size in zip(sizes, batch_sizes, strict=True)]
    if length != "each":
        own = [length if isinstance(length, int) else {"smallest": min, "largest": max}[length](own)] * len(own)
    return [times * count for count in own]


def _sequential(counts: np.ndarray, probabilities: np.ndarray, seed: int) -> np.ndarray:
    """Task after task: all steps of the first one, then all of the next (papers 001, section 5.3, and 003)."""
    return np.repeat(np.arange(len(counts)), counts)


def _round_robin(counts: np.ndarray, probabilities: np.ndarray, seed: int) -> np.ndarray:
    """One step of each task in turn (paper 002, section 4.4); a task without steps left is left out."""
    rounds = np.concatenate([np.arange(count) for count in counts])
    return _sequential(counts, probabilities, seed)[np.argsort(rounds, kind="stable")]


def _shuffled(counts: np.ndarray, probabilities: np.ndarray, seed: int) -> np.ndarray:
    """All steps of all tasks in a random order (paper 003, section 3)."""
    return _sequential(counts, probabilities, seed)[_permutation(int(counts.sum()), seed)]


def _proportional(counts: np.ndarray, probabilities: np.ndarray, seed: int) -> np.ndarray:
    """Each step's task drawn independently with these probabilities (Stickland and Murray 2019)."""
    draws = np.random.PCG64(seed).random_raw(int(counts.sum())) / 2.0**64
    return np.searchsorted(np.cumsum(probabilities)[:-1], draws, side="right")


# By name: from each task's steps in an epoch [T], its probability [T] and a seed to the task of every step.
ORDERS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "sequential": _sequential,
    "round-robin": _round_robin,
    "shuffled": _shuffled,
    "proportional": _proportional,
}


def token_budget_batches(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Split examples, sorted by length, into batches of at most `tokens` tokens.

    An example with more tokens is a batch alone.

    Args:
        lengths: tokens of each example, [n].
        tokens: the budget of a batch.

    Returns:
        Index arrays, int64; every index is in exactly one of them.
    """
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    batches, start, used = [], 0, 0
    while start < len(order):
        stop = max(start + 1, int(np.searchsorted(ends, used + tokens, side="right")))
        batches.append(order[start:stop])
        start, used = stop, int(ends[stop - 1])
    return batches


@functools.lru_cache(maxsize=16)  # this pass and the next of all tasks
def _permutation(n: int, seed: int) -> np.ndarray:
    """A random order of 0..n-1, read-only.

    Sorting raw numbers of the bit generator gives the same order in every NumPy, unlike `Generator.permutation`.
    """
    order = np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
    order.flags.writeable = False
    return order
