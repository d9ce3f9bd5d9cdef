"""Examples that are held out of training: a dev share of the training examples, and the folds of cross-validation.

Which ones depends on the examples alone, never on the run's seed: texts are in the order of a hash of theirs. Examples
with the same text, or the same pair in either order, stay together, so no held-out text is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minbert.data.examples import Examples
from minbert.data.source import SPLITS, Source
from minbert.errors import UserError
from minbert.tasks import Task

BINS = 10  # of a regression's labels
CHUNK = 1 << 16  # examples whose labels are compared at once


def dev_rows(examples: Examples, task: Task, share: float) -> np.ndarray:
    """The indices of the examples to hold out for dev, sorted, int64.

    That share of each stratum is held out, up to rounding. A stratum is a class, the rarest label of an example of a
    multi-label task, or one of `BINS` ranges of a regression's labels. The last text of a class stays in training, and
    so does the last example of a label.

    Args:
        share: between 0 and 1.
    """
    groups, of_groups = _groups(examples, _strata(examples, task))
    sizes = np.bincount(groups)
    by_stratum = np.argsort(of_groups, kind="stable")
    members = np.split(by_stratum, np.cumsum(np.bincount(of_groups))[:-1])
    members = [each for each in members if len(each)]
    held = np.zeros(len(sizes), bool)
    kept = 0 if task.is_regression else 1
    for each, target in zip(members, _targets(members, sizes, share, kept), strict=True):
        held[_filled(each, sizes[each], target, kept)] = True
    if held.all():
        held[0] = False
    if examples.labels is not None and not task.is_regression:
        _return_last_of_labels(held, groups, _label_rows(examples.labels, task))
    return np.flatnonzero(held[groups])


def fold_numbers(examples: Examples, task: Task, folds: int) -> np.ndarray:
    """The fold, from 0, that each example is held out in, int64 [n].

    The texts of a stratum, as in `dev_rows`, are dealt to the folds in turn.
    """
    groups, of_groups = _groups(examples, _strata(examples, task))
    fold = np.empty(len(of_groups), np.int64)
    fold[np.argsort(of_groups, kind="stable")] = np.arange(len(of_groups)) % folds
    return fold[groups]


class Folds:
    """A source whose train split is without one fold, which is its dev split; test is as it is.

    A dev share of the source's is trained on.

    Args:
        folds: their number, 2 or more.
        fold: the one that is held out, from 0.
    """

    def __init__(self, source: Source, folds: int, fold: int) -> None:
        self.name = f"{source.name}, fold {fold + 1} of {folds}"
        self._source, self._folds, self._fold = source, folds, fold
        self._read: dict[str, tuple[Examples, np.ndarray]] = {}

    def tasks(self) -> list[str]:
        return self._source.tasks()

    def splits(self, task: Task) -> list[str]:
        splits = self._source.splits(task)
        return [split for split in SPLITS if split in splits or (split == "dev" and self._is_folded(task))]

    def _is_folded(self, task: Task) -> bool:
        return task.evaluated and "train" in self._source.splits(task)

    def complete(self, task: Task) -> Task:
        return self._source.complete(task)

    def warnings(self, task: Task) -> list[str]:
        return self._source.warnings(task)

    def load(self, task: Task, split: str) -> Examples:
        if split == "test" or not self._is_folded(task):
            return self._source.load(task, split)
        if task.name not in self._read:
            examples = self._source.load(replace(task, dev=None), "train")
            self._read[task.name] = examples, fold_numbers(examples, task, self._folds)
        examples, numbers = self._read[task.name]
        held = numbers == self._fold
        if not held.any() or held.all():
            raise UserError(
                f"{self._source.name}: the train split of {task.name} has fewer different texts than {self._folds}"
                " folds; give fewer --folds"
            )
        chosen = examples.select(np.flatnonzero(held if split == "dev" else ~held))
        return chosen if split == "dev" else replace(chosen, skipped=examples.skipped)


def _groups(examples: Examples, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The group of each example, in which all have the same text, int64 [n]; the stratum of each group.

    Groups are numbered in the order of their texts' hashes. A group's stratum is the smallest one of its examples.
    """
    hashes = text_hashes(examples.texts, examples.pairs)
    _, groups = np.unique(hashes, return_inverse=True)
    smallest_first = np.lexsort([strata, np.bincount(strata)[strata], groups])
    _, first = np.unique(groups[smallest_first], return_index=True)
    return groups, strata[smallest_first[first]]


def text_hashes(texts: Sequence[str], pairs: Sequence[str] | None) -> np.ndarray:
    """A hash of each text, or of each pair whatever its order, uint64 [n]."""
    hashes = _hashes(texts)
    if pairs is None:
        return hashes
    both = np.stack([hashes, _hashes(pairs)])
    return both.min(0) * np.uint64(0x9E3779B97F4A7C15) + both.max(0)  # modulo 2^64


def _hashes(texts: Sequence[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<u8")


def _strata(examples: Examples, task: Task) -> np.ndarray:
    """The stratum of each example, int64 [n]."""
    labels = examples.labels
    if labels is None:
        return np.zeros(len(examples), np.int64)
    if task.is_regression:
        edges = np.unique(np.quantile(labels, np.arange(1, BINS) / BINS))
        return np.searchsorted(edges, labels, side="right")
    if not task.is_multilabel:
        return labels.astype(np.int64)
    counts = np.append((labels > 0).sum(0), len(labels)).astype(np.float32)  # the last stratum: no label
    strata = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), CHUNK):
        chunk = labels[start : start + CHUNK] > 0
        with_none = np.concatenate([chunk, ~chunk.any(1, keepdims=True)], axis=1)
        strata[start : start + CHUNK] = np.where(with_none, counts, np.inf).argmin(1)
    return strata


def _targets(members: Sequence[np.ndarray], sizes: np.ndarray, share: float, kept: int) -> list[int]:
    """How many examples of each stratum to hold out: rounded so that their sum is the share of all.

    Args:
        kept: groups of each stratum that stay in training.
    """
    counts = np.array([sizes[each].sum() for each in members])
    wanted = counts * share
    targets = np.floor(wanted).astype(np.int64)
    missing = int(np.floor(counts.sum() * share + 0.5)) - int(targets.sum())
    largest_remainder = np.lexsort([np.array([each[0] for each in members]), targets - wanted])
    room = [number for number in largest_remainder if targets[number] < len(members[number]) - kept]
    targets[room[: max(0, missing)]] += 1
    return targets.tolist()


def _filled(members: np.ndarray, sizes: np.ndarray, target: int, kept: int) -> np.ndarray:
    """Groups whose sizes sum up to about `target`: all but `kept` at most."""
    most = len(members) - kept
    if (sizes == 1).all():
        return members[: min(target, most)]
    chosen: list[int] = []
    count = 0
    for member, size in zip(members.tolist(), sizes.tolist(), strict=True):
        if count >= target or len(chosen) == most:
            break
        if 2 * (target - count) >= size:
            chosen.append(member)
            count += size
    return np.array(chosen, np.int64)


def _label_rows(labels: np.ndarray, task: Task) -> list[np.ndarray]:
    """Of each label the examples that have it."""
    if task.is_multilabel:
        return [np.flatnonzero(column) for column in labels.T]
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _return_last_of_labels(held: np.ndarray, groups: np.ndarray, label_rows: Sequence[np.ndarray]) -> None:
    """Give a group back to training for each label that has no example there."""
    for rows in label_rows:
        of_label = groups[rows]
        if len(rows) and held[of_label].all():
            held[of_label.min()] = False
