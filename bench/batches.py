"""Batches as long as real ones, without the data: sentence lengths drawn from the deciles of the course's files."""

from __future__ import annotations

import numpy as np

from minbert.data.packing import Packed, pack

# Tokens of a training example at the minimum, each decile and the maximum (BERT's uncased vocabulary).
DECILES = {
    "sst": (4, 11, 15, 18, 21, 24, 27, 30, 35, 41, 80),
    "qqp": (11, 19, 21, 23, 25, 27, 30, 33, 38, 47, 160),
    "sts": (9, 16, 18, 19, 21, 23, 26, 30, 38, 50, 125),
}
TAIL = 4.0  # how much thinner than evenly the last tenth is spread: brings the means to the real 25, 30 and 28


def lengths(task: str, count: int, seed: int = 0) -> np.ndarray:
    """`count` sequence lengths in tokens, int64."""
    u = np.random.Generator(np.random.PCG64(seed)).random(count)
    last = np.clip((u - 0.9) * 10, 0, 1)
    u = np.where(u > 0.9, 0.9 + 0.1 * last**TAIL, u)
    return np.interp(u, np.linspace(0, 1, 11), DECILES[task]).astype(np.int64)


def sequences(task: str, count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random token ids of those lengths."""
    generator = np.random.Generator(np.random.PCG64(seed + 1))
    return [generator.integers(1, vocabulary, n).tolist() for n in lengths(task, count, seed)]


def joint_batch(batch_size: int, vocabulary: int, part: slice = slice(None)) -> Packed:
    """`batch_size` sequences of each task, or a part of them, in one packed stream."""
    rows = [sequences(task, batch_size, vocabulary, 100 * i)[part] for i, task in enumerate(DECILES)]
    return pack([row for of_task in rows for row in of_task])
