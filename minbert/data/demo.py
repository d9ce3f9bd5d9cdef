"""The built-in demo corpus: sentiment, paraphrase and similarity in plain English, made from templates by a fixed seed.

What an example is about is drawn; classes take turns by its number, so that every split has as many examples of each.
Which split a sentence belongs to is a function of its text, so dev and test hold no sentence of the train split:
neither as an example nor as one half of a pair.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable

import numpy as np

from minbert.data.demo_dice import Dice
from minbert.data.demo_paraphrase import questions
from minbert.data.demo_sentiment import review
from minbert.data.demo_similarity import scenes
from minbert.data.formats import Examples
from minbert.seeds import derive_seed

Draw = Callable[[Dice, int], tuple[tuple[str, ...], float]]  # the texts and the label of the example of that number

TASKS: dict[str, Draw] = {"sst": review, "qqp": questions, "sts": scenes}
SIZES = {"train": 4800, "dev": 800, "test": 800}
SHARES = ("train", "train", "train", "dev", "test")  # of all sentences


@functools.cache
def examples(task: str, split: str) -> Examples:
    """All examples of a task (sst, qqp or sts) in a split (train, dev or test), the same on every machine."""
    dice = Dice(derive_seed("demo", task, split))
    rows: dict[tuple[str, ...], float] = {}
    while len(rows) < SIZES[split]:
        texts, label = TASKS[task](dice, len(rows))
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
    return SHARES[zlib.crc32(text.encode()) % len(SHARES)]
