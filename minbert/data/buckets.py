"""Buckets of batch shapes. A CUDA graph is of one shape: with buckets, batches of a run have few shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np

from minbert.data.encoded import Encoded

LEVELS = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # standard deviations above the mean number of tokens
MULTIPLE = 32  # of tokens
SHORTEST = 32  # bucket of the longest sequence
FILL = 7.0  # standard deviations of tokens that padding sequences can take without being more than usual
SHARE = 0.25  # of batches that the smallest bucket of the longest sequence has to hold


class Buckets:
    """Pads batches to few shapes, which follow from how many tokens batches of this data have.

    The tasks of a batch come in segments, consecutive tasks whose numbers of tokens are part of the shape. A segment of
    n examples has a mean and a standard deviation, those of n examples that are drawn by themselves. All segments are
    padded to the same level: the smallest of `LEVELS`, in standard deviations above their means, that holds all. So a
    batch has one of a few levels, whatever the number of segments. The longest sequence's length is rounded up to a
    power of 2.

    Args:
        data: by task, its training examples.
        limit: no sequence is longer than this.
    """

    def __init__(self, data: Mapping[str, Encoded], limit: int) -> None:
        self._longest = [SHORTEST]
        while self._longest[-1] < limit:
            self._longest.append(min(limit, 2 * self._longest[-1]))
        self._longest[-1] = min(self._longest[-1], limit)
        self._widths = {name: encoded.width for name, encoded in data.items()}
        self._means = {name: float(encoded.lengths.mean()) for name, encoded in data.items()}
        self._variances = {name: float(encoded.lengths.var()) for name, encoded in data.items()}
        self._shares = {name: self._held(np.diff(encoded.offsets)) for name, encoded in data.items()}

    def _held(self, lengths: np.ndarray) -> list[float]:
        """The shares of the sequences that the buckets of the longest hold."""
        return [float((lengths <= longest).mean()) for longest in self._longest]

    def pad(
        self, lengths: Sequence[np.ndarray], tasks: Sequence[str], segments: Sequence[int]
    ) -> tuple[int, list[np.ndarray]]:
        """The bucket of a batch.

        Args:
            lengths: of the sequences of each task of the batch, in tokens.
            tasks: their names.
            segments: the number of tasks of each segment.

        Returns:
            the length that stands for the longest sequence's, and for each task the lengths of the padding sequences
            after its own. All tasks have as many; none is empty or longer than the longest.
        """
        counts = [len(of_task) for of_task in lengths]
        longest = self._bucket_of_longest(max(int(of_task.max()) for of_task in lengths), tasks, counts)
        groups = [slice(*ends) for ends in pairwise(accumulate(segments, initial=0))]
        tokens = [sum(int(of_task.sum()) for of_task in lengths[group]) for group in groups]
        expected = [self._expected(tasks[group], counts[group]) for group in groups]
        widest = max(deviation for _, deviation in expected)
        padding, fits = max(1, math.ceil(FILL * widest / longest)), False
        while not fits:
            added = [padding * size for size in segments]
            fills = _fills(tokens, added, expected)
            needed = max(math.ceil(fill / (size * longest)) for fill, size in zip(fills, segments, strict=True))
            fits = needed <= padding
            padding = padding if fits else 2 * padding
        spread = [_evenly(fill, padding * size) for fill, size in zip(fills, segments, strict=True)]
        return longest, [
            of_task for of_group, size in zip(spread, segments, strict=True) for of_task in of_group.reshape(size, -1)
        ]

    def _expected(self, tasks: Sequence[str], counts: Sequence[int]) -> tuple[float, float]:
        """The mean and the standard deviation of a segment's number of tokens."""
        examples = {name: count // self._widths[name] for name, count in zip(tasks, counts, strict=True)}
        variance = sum(n * self._variances[name] for name, n in examples.items())
        return sum(n * self._means[name] for name, n in examples.items()), math.sqrt(variance)

    def _bucket_of_longest(self, longest: int, tasks: Sequence[str], counts: Sequence[int]) -> int:
        """The smallest bucket that holds the batch's longest sequence, and `SHARE` of all such batches'."""
        for number, bucket in enumerate(self._longest):
            powers = (self._shares[name][number] ** count for name, count in zip(tasks, counts, strict=True))
            if bucket >= longest and math.prod(powers) >= SHARE:
                return bucket
        return self._longest[-1]


def _fills(tokens: Sequence[int], added: Sequence[int], expected: Sequence[tuple[float, float]]) -> list[int]:
    """The tokens that bring every segment to the level that holds all, with at least `added` more than it has."""
    for level in _levels():
        sizes = [
            math.ceil((mean + level * deviation + more) / MULTIPLE) * MULTIPLE
            for (mean, deviation), more in zip(expected, added, strict=True)
        ]
        fills = [size - own for size, own in zip(sizes, tokens, strict=True)]
        if all(fill >= more for fill, more in zip(fills, added, strict=True)):
            return fills
    raise AssertionError


def _levels() -> Iterator[float]:
    """`LEVELS`, and higher ones for the few batches that are larger."""
    yield from LEVELS
    level = LEVELS[-1]
    while True:
        level *= 2
        yield level


def _evenly(tokens: int, sequences: int) -> np.ndarray:
    """The lengths of so many sequences that have so many tokens together."""
    return np.full(sequences, tokens // sequences) + (np.arange(sequences) < tokens % sequences)
