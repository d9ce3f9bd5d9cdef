"""Which examples a step sees, as pure functions of the step: resuming a run needs nothing but its number."""

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


@dataclass(frozen=True)
class Plan:
    """Which tasks take each step of a run, and how many steps each has taken before."""

    names: tuple[str, ...]
    epoch_steps: int
    steps: int
    turns: np.ndarray | None = None  # [steps]: the task of each step, as an index of `names`; None: all take every step

    def at(self, step: int) -> dict[str, int]:
        """The tasks that take step `step` (from 0), each with the number of steps it took before."""
        if self.turns is None:
            return dict.fromkeys(self.names, step)
        return {self.names[self.turns[step]]: int(self._numbers[step])}

    def steps_of(self, name: str) -> int:
        """How many of the run's steps the task takes."""
        return self.steps if self.turns is None else int((self.turns == self.names.index(name)).sum())

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        """[steps]: how many steps before this one its task took."""
        assert self.turns is not None
        numbers = np.empty(len(self.turns), np.int64)
        for index in range(len(self.names)):
            taken = np.flatnonzero(self.turns == index)
            numbers[taken] = np.arange(len(taken))
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
    """Plan a run from its options alone, so that a step's batches never depend on what ran before.

    Args:
        sizes: examples of each task, in the tasks' order.
        batch_sizes: examples of each task in a step that it takes.
        order: `joint`, where every task takes every step, or a name in `ORDERS`.
        length: see `epoch_counts`.
        times: how many times as long an epoch is.
        weights: how many times as often a task takes a step; 1 where left out.
        alphas: exponent of the sizes in the first and in the last epoch, with even steps between; for `proportional`.
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
    turns = []
    for epoch in range(epochs):
        alpha = alphas[0] + (alphas[1] - alphas[0]) * epoch / max(1, epochs - 1)
        odds = np.array([factor * sizes[name] ** alpha for name, factor in zip(names, factors, strict=True)])
        turns.append(ORDERS[order](np.array(counts), odds / odds.sum(), derive_seed(seed, "turns", epoch)))
    return Plan(names, sum(counts), total, np.concatenate(turns)[:total])


def epoch_counts(sizes: Sequence[int], batch_sizes: Sequence[int], length: EpochLength, times: int = 1) -> list[int]:
    """Batches of each task in an epoch.

    Args:
        sizes: examples of each task.
        batch_sizes: examples in a batch of each task.
        length: as many as show the task that is through first (`smallest`) or last (`largest`) all of its examples,
            as many for each task as show it all of its own (`each`), or this number.
        times: as many times more (paper 004, section 4.5).
    """
    own = [-(-size // batch_size) for size, batch_size in zip(sizes, batch_sizes, strict=True)]
    if length != "each":
        own = [length if isinstance(length, int) else {"smallest": min, "largest": max}[length](own)] * len(own)
    return [times * count for count in own]


def _sequential(counts: np.ndarray, odds: np.ndarray, seed: int) -> np.ndarray:
    """Task after task: all steps of the first one, then all of the next (papers 001, section 5.3, and 003)."""
    return np.repeat(np.arange(len(counts)), counts)


def _round_robin(counts: np.ndarray, odds: np.ndarray, seed: int) -> np.ndarray:
    """One step of each task in turn (paper 002, section 4.4); a task that has had its share is passed over."""
    rounds = np.concatenate([np.arange(count) for count in counts])
    return _sequential(counts, odds, seed)[np.argsort(rounds, kind="stable")]


def _shuffled(counts: np.ndarray, odds: np.ndarray, seed: int) -> np.ndarray:
    """All steps of all tasks in a random order (paper 003, section 3)."""
    return _sequential(counts, odds, seed)[_permutation(int(counts.sum()), seed)]


def _proportional(counts: np.ndarray, odds: np.ndarray, seed: int) -> np.ndarray:
    """Every step's task drawn by itself, with these odds (Stickland and Murray 2019)."""
    draws = np.random.PCG64(seed).random_raw(int(counts.sum())) / 2.0**64
    return np.searchsorted(np.cumsum(odds)[:-1], draws, side="right")


# By name: from each task's steps in an epoch [T], its odds [T] (their sum is 1) and a seed to the task of every step.
ORDERS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "sequential": _sequential,
    "round-robin": _round_robin,
    "shuffled": _shuffled,
    "proportional": _proportional,
}


def token_split(lengths: np.ndarray, parts: int) -> np.ndarray:
    """Cut a row of examples into stretches of about as many tokens, each of at least one example.

    Args:
        lengths: tokens of each example, [n].

    Returns:
        bounds of the stretches, int64 [parts + 1], from 0 to n.

    Raises:
        ValueError: fewer examples than parts.
    """
    if len(lengths) < parts:
        raise ValueError(f"expected at least {parts} examples for as many parts, got {len(lengths)}")
    ends = np.cumsum(lengths)
    wanted = ends[-1] * np.arange(1, parts) / parts
    cuts = np.searchsorted(ends, wanted)
    cuts += ends[cuts] - wanted < wanted - (ends[cuts] - lengths[cuts])  # the nearer end of the example that is cut
    numbers = np.arange(parts + 1)
    bounds = np.concatenate([[0], cuts, [len(lengths)]]) - numbers
    return np.minimum(np.maximum.accumulate(np.maximum(bounds, 0)), len(lengths) - parts) + numbers


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
