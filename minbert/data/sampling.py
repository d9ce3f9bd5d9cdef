"""Which examples a step sees, as pure functions of the step: resuming a run needs nothing but its number."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minbert.seeds import derive_seed


@dataclass(frozen=True)
class TaskSampler:
    """Batches from an endless sequence of passes over `n` examples, each pass in a fresh random order.

    Batches straddle passes, so each has `batch_size` examples whatever `n` is.

    Raises:
        ValueError: no examples, or an empty batch.
    """

    n: int
    batch_size: int
    seed: int
    name: str  # the task's: two tasks of one size have different orders

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


def task_at(step: int, tasks: int, mode: Literal["round-robin", "shuffled"], seed: int) -> tuple[int, int]:
    """The task that takes step `step` (from 0) when one does at a time, and the number of that task's batch.

    Every cycle of `tasks` steps visits each task once: in the fixed order, or in one shuffled anew for each cycle.

    Raises:
        ValueError: an unknown mode.
    """
    cycle, slot = divmod(step, tasks)
    if mode == "round-robin":
        return slot, cycle
    if mode == "shuffled":
        return int(_permutation(tasks, derive_seed(seed, "cycle", cycle))[slot]), cycle
    raise ValueError(f"mode must be 'round-robin' or 'shuffled', got {mode!r}")


def steps_per_epoch(sizes: Sequence[int], batch_size: int, epoch_length: Literal["smallest", "largest"] | int) -> int:
    """Joint steps (a batch of each task) in one epoch: those it takes to see the smallest or the largest task once.

    Args:
        sizes: examples of each task.
        batch_size: examples of each task in a step.
        epoch_length: `smallest`, `largest`, or the number of steps itself.
    """
    if isinstance(epoch_length, int):
        return epoch_length
    size = {"smallest": min, "largest": max}[epoch_length](sizes)
    return -(-size // batch_size)


def token_budget_batches(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Split examples into batches of at most `tokens` tokens, those of like length together.

    A single example that is longer than `tokens` makes a batch of its own.

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


@functools.lru_cache(maxsize=16)  # of all tasks, the pass at hand and the next
def _permutation(n: int, seed: int) -> np.ndarray:
    """A random order of 0..n-1, read-only.

    Sorting raw words of the bit generator gives the same order under every NumPy, which `Generator.permutation` does
    not promise.
    """
    order = np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
    order.flags.writeable = False
    return order
