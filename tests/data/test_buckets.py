"""Buckets: every batch fits, shapes are few, and padding is as short as the levels allow."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from minbert.data import Encoded
from minbert.data.buckets import FILL, LEVELS, MULTIPLE, Buckets


def encoded(lengths: np.ndarray, width: int = 1) -> Encoded:
    """Sequences of these lengths."""
    n, tokens = len(lengths) // width, int(lengths.sum())
    offsets = np.cumsum([0, *lengths])
    return Encoded(np.zeros(tokens, np.int32), np.zeros(tokens, np.uint8), offsets, None, [""] * n, 0, width)


def drawn(seed: int, low: int, high: int, width: int = 1) -> Encoded:
    return encoded(np.random.default_rng(seed).integers(low, high, 600), width)


DATA = {"a": drawn(0, 3, 60), "b": drawn(1, 5, 30, width=2), "c": drawn(2, 10, 90)}
LENGTHS = {name: np.diff(of.offsets) for name, of in DATA.items()}
ALL, LIMIT = list(DATA), 100


def batch(seed: int, n: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(LENGTHS[name], n * DATA[name].width) for name in ALL]


def shape(lengths, longest, padding, segments) -> tuple[int, ...]:
    """What a graph is built for."""
    totals = [int(own.sum() + added.sum()) for own, added in zip(lengths, padding, strict=True)]
    ends = np.cumsum([0, *segments])
    return longest, len(padding[0]), *(sum(totals[low:high]) for low, high in pairwise(ends))


@pytest.mark.parametrize("segments", [[1, 1, 1], [3], [2, 1]])
def test_every_batch_fits_and_shapes_are_few(segments):
    buckets, shapes = Buckets(DATA, LIMIT), set()
    for seed in range(600):
        lengths = batch(seed)
        longest, padding = buckets.pad(lengths, ALL, segments)
        assert max(of_task.max() for of_task in lengths) <= longest <= LIMIT
        assert len({len(added) for added in padding}) == 1
        assert all(1 <= added.min() <= added.max() <= longest for added in padding)
        found = shape(lengths, longest, padding, segments)
        assert all(total % MULTIPLE == 0 for total in found[2:])
        shapes.add(found)
    assert len(shapes) <= len(LEVELS) + 2


def test_one_segment_is_padded_to_the_next_level():
    buckets = Buckets(DATA, LIMIT)
    deviation = np.sqrt(sum(16 * DATA[name].lengths.var() for name in ALL))
    for seed in range(50):
        lengths = batch(seed)
        longest, padding = buckets.pad(lengths, ALL, [3])
        usual = int(np.ceil(FILL * deviation / longest))
        assert len(padding[0]) == usual
        added = sum(int(of_task.sum()) for of_task in padding)
        below = sum(int(of_task.sum()) for of_task in lengths) < sum(16 * DATA[name].lengths.mean() for name in ALL)
        assert added <= 3 * usual + MULTIPLE + deviation * (3.5 if below else 1)


def test_batches_beyond_all_levels_fit_too():
    buckets = Buckets(DATA, LIMIT)
    for lengths in ([np.full(16, 59), np.full(32, 29), np.full(16, 89)], [np.full(n, 1) for n in (16, 32, 16)]):
        longest, padding = buckets.pad(lengths, ALL, [1, 1, 1])
        assert all(1 <= added.min() <= added.max() <= longest for added in padding)
        assert len({len(added) for added in padding}) == 1


@pytest.mark.parametrize(("length", "limit", "longest"), [(7, 512, 32), (33, 512, 64), (129, 200, 200), (20, 20, 20)])
def test_batches_of_one_length_have_one_shape(length, limit, longest):
    data = {"same": encoded(np.full(50, length))}
    lengths = [np.full(10, length)]
    found, (padding,) = Buckets(data, limit).pad(lengths, ["same"], [1])
    assert found == longest
    assert (10 * length + padding.sum()) % MULTIPLE == 0
    assert 1 <= padding.sum() <= MULTIPLE


def test_a_bucket_that_few_batches_fit_in_is_not_used():
    """One sequence in 20 is long: 16 sequences have none with probability 0.44, 64 with 0.04."""
    data = {"mixed": encoded(np.array([10] * 19 + [60]))}
    buckets = Buckets(data, 512)
    assert buckets.pad([np.full(16, 10)], ["mixed"], [1])[0] == 32
    assert buckets.pad([np.full(64, 10)], ["mixed"], [1])[0] == 64
