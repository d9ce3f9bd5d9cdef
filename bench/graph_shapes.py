"""How many shapes the batches of a run have, each of which is a CUDA graph, and what share of their tokens is padding.

python bench/graph_shapes.py prints both for batches of 32 sequences of each task: with one gradient, with one
gradient of each task, and with SMART on one task of three. Lengths are those of the course's data where
MINBERT_TEST_DATA is set, else drawn from the deciles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from batches import DECILES, course, lengths

from minbert.data import Encoded
from minbert.data.buckets import Buckets

BATCH, STEPS, LIMIT, EXAMPLES = 32, 3000, 512, 20_000
SEGMENTS = {"one gradient": [3], "a gradient of each task": [1, 1, 1], "SMART on the first task": [1, 2]}


def drawn(task: str) -> Encoded:
    """Examples of lengths that are drawn from the deciles."""
    found = lengths(task, EXAMPLES, 7)
    tokens, offsets = int(found.sum()), np.cumsum([0, *found])
    return Encoded(np.zeros(tokens, np.int32), np.zeros(tokens, np.uint8), offsets, None, [""] * EXAMPLES, 0)


def met(data: Mapping[str, Encoded], segments: Sequence[int], steps: int = STEPS) -> tuple[Counter[tuple], float]:
    """How often each shape is met in so many steps, and the padding tokens for each token of the data."""
    rng, buckets, shapes, padded, own = np.random.default_rng(0), Buckets(data, LIMIT), Counter[tuple](), 0, 0
    ends = np.cumsum([0, *segments])
    for _ in range(steps):
        batch = [np.diff(of.offsets)[rng.integers(0, len(of), BATCH)] for of in data.values()]
        longest, padding = buckets.pad(batch, list(data), segments)
        totals = [int(real.sum() + added.sum()) for real, added in zip(batch, padding, strict=True)]
        of_segments = (sum(totals[low:high]) for low, high in pairwise(ends))
        shapes[(longest, len(padding[0]), *of_segments)] += 1
        padded += sum(int(added.sum()) for added in padding)
        own += sum(int(real.sum()) for real in batch)
    return shapes, padded / own


def main() -> None:
    data = {task: course(task) or drawn(task) for task in DECILES}
    print("| batches | shapes | padding | steps without a graph |\n|---|--:|--:|--:|")
    for name, segments in SEGMENTS.items():
        shapes, padded = met(data, segments)
        print(f"| {name} | {len(shapes)} | {padded:.1%} | {len(shapes) / STEPS:.1%} |")


if __name__ == "__main__":
    main()
