"""The built-in demo corpus: sentiment, paraphrase and similarity in plain English, made from templates by a fixed seed.

The subject of an example is drawn; its class follows from its number, so every split has as many examples of each
class. The split of a sentence is a function of its text, so dev and test share no sentence with train: neither as an
example nor as one half of a pair.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable

import numpy as np

from minbert.data.demo.paraphrase import questions
from minbert.data.demo.seeded_random import SeededRandom
from minbert.data.demo.sentiment import review
from minbert.data.demo.similarity import scenes
from minbert.data.examples import Examples
from minbert.seeds import derive_seed

Generator = Callable[[SeededRandom, int], tuple[tuple[str, ...], float]]  # from an example's number to texts and label

GENERATORS: dict[str, Generator] = {"sst": review, "qqp": questions, "sts": scenes}
SIZES = {"train": 4800, "dev": 800, "test": 800}
SPLITS_BY_HASH = ("train", "train", "train", "dev", "test")


@functools.cache
def examples(task: str, split: str) -> Examples:
    """All examples of a task (sst, qqp or sts) in a split (train, dev or test), the same on every machine."""
    random = SeededRandom(derive_seed("demo", task, split))
    rows: dict[tuple[str, ...], float] = {}
    while len(rows) < SIZES[split]:
        texts, label = GENERATORS[task](random, len(rows))
        if len(set(texts)) == len(texts) and all(_split(text) == split for text in texts):
            rows[texts] = label
    columns = list(zip(*rows, strict=True))
    return Examples(
        [f"{task}-{split}-{number}" for number in range(len(rows))],
        list(columns[0]),
        list(columns[1]) if len(columns) == 2 else None,
        np.array(list(rows.values()), np.float32),
    )


def _split(text: str) -> str:
    return SPLITS_BY_HASH[zlib.crc32(text.encode()) % len(SPLITS_BY_HASH)]
