"""Batches as long as real ones: the course's sentences where they are, else lengths drawn from the files' deciles."""

from __future__ import annotations

import functools
import os

import numpy as np

from minbert.data import Encoded, encode, open_source
from minbert.data.packing import Packed, pack
from minbert.data.tokenizer import Tokenizer
from minbert.tasks import find_tasks

# Tokens of a training example at the minimum, each decile and the maximum (BERT's uncased vocabulary).
DECILES = {
    "sst": (4, 11, 15, 18, 21, 24, 27, 30, 35, 41, 80),
    "qqp": (11, 19, 21, 23, 25, 27, 30, 33, 38, 47, 160),
    "sts": (9, 16, 18, 19, 21, 23, 26, 30, 38, 50, 125),
}
TAIL = 4.0  # how much thinner than evenly the last tenth is spread: brings the means to the real 25, 30 and 28
DATA, MODEL = os.environ.get("MINBERT_TEST_DATA"), os.environ.get("MINBERT_TEST_MODEL")
MAX_LENGTH = 512
BATCHES = 4 if DATA else 1  # that the steps of a race take in turns


@functools.cache
def _tokenizer() -> Tokenizer:
    """Of MINBERT_TEST_MODEL, or one learned from the course's SST sentences."""
    if MODEL:
        return Tokenizer.from_pretrained(MODEL)
    return Tokenizer.train(open_source(DATA).load(find_tasks(["sst"])[0], "train").texts, 30522)


@functools.cache
def course(task: str, split: str = "train") -> Encoded | None:
    """The course's examples of a task, where MINBERT_TEST_DATA is set."""
    if not DATA:
        return None
    (found,) = find_tasks([task])
    return encode(open_source(DATA).load(found, split), _tokenizer(), MAX_LENGTH)


def lengths(task: str, count: int, seed: int = 0) -> np.ndarray:
    """`count` sequence lengths in tokens, int64, drawn from the deciles."""
    u = np.random.Generator(np.random.PCG64(seed)).random(count)
    last = np.clip((u - 0.9) * 10, 0, 1)
    u = np.where(u > 0.9, 0.9 + 0.1 * last**TAIL, u)
    return np.interp(u, np.linspace(0, 1, 11), DECILES[task]).astype(np.int64)


def drawn(task: str, count: int, vocabulary: int, seed: int = 0, split: str = "train") -> list[list[int]]:
    """Token ids of `count` of the course's examples, the first of them in dev; without the data, `sequences`."""
    encoded = course(task, split)
    if encoded is None:
        return sequences(task, count, vocabulary, seed)
    order = np.arange(count) if split != "train" else np.random.default_rng(seed).choice(len(encoded), count, False)
    rows = (encoded.token_ids[encoded.offsets[i] : encoded.offsets[i + 1]] for i in order)
    return [np.minimum(row, vocabulary - 1).tolist() for row in rows]


def sequences_as(encoding: str, row: list[int]) -> list[list[int]]:
    """The sequences of an example that a cross-encoder reads as `row`, by a key of `PAIR_ENCODINGS`.

    A pair ends at its first [SEP]; one of random tokens is divided in the middle.
    """
    if encoding == "cross-encoder":
        return [row]
    end = row.index(row[-1]) + 1
    end = end if end < len(row) else len(row) // 2
    apart = [row[:end], [row[0], *row[end:]]]
    return apart if encoding == "bi-encoder" else [row, *apart]


def sequences(task: str, count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random token ids of drawn lengths."""
    generator = np.random.Generator(np.random.PCG64(seed + 1))
    return [generator.integers(1, vocabulary, n).tolist() for n in lengths(task, count, seed)]


def joint_batch(batch_size: int, vocabulary: int, part: slice = slice(None)) -> Packed:
    """`batch_size` sequences of each task, or a part of them, in one packed stream."""
    rows = [drawn(task, batch_size, vocabulary, 100 * i)[part] for i, task in enumerate(DECILES)]
    return pack([row for of_task in rows for row in of_task])
