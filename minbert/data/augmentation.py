"""Further training examples: swapped pairs, and paraphrases of the examples at hand from a file."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from minbert.data.examples import Examples, Row, check_row
from minbert.data.formats import read_rows
from minbert.data.skipped import Skipped
from minbert.data.text_column import TextColumn
from minbert.errors import UserError, one_line
from minbert.files.json_yaml import short
from minbert.tasks import Task
from minbert.tasks.labels import LabelEncoder, decode_labels, split_labels

LabelValue = float | tuple[float, ...]  # of an example inside minbert


def joined(*parts: Examples) -> Examples:
    """The parts' examples, all of one task and with labels, in one."""
    pairs = [part.pairs for part in parts if part.pairs is not None]
    return Examples(
        [identity for part in parts for identity in part.ids],
        _joined_texts([part.texts for part in parts]),
        _joined_texts(pairs) if pairs else None,
        np.concatenate([part.labels for part in parts if part.labels is not None]),
        [row for part in parts for row in part.skipped],
    )


def _joined_texts(parts: Sequence[Sequence[str]]) -> Sequence[str]:
    """All texts in one list, or on disk if a part is."""
    texts = itertools.chain.from_iterable(parts)
    return TextColumn.of(texts) if any(isinstance(part, TextColumn) for part in parts) else list(texts)


def swapped(examples: Examples) -> Examples:
    """Pairs with their sentences in the other order: similarity is symmetric (paper 000, section 3.4)."""
    assert examples.pairs is not None, "only pairs can be swapped"
    return Examples(examples.ids, examples.pairs, examples.texts, examples.labels)


def read_augmented(
    path: str | Path,
    task: Task,
    originals: Examples,
    held_out: Collection[str] = (),
    *,
    leave_out: bool = False,
) -> Examples:
    """Read paraphrases, such as back-translations, of training examples (paper 002, section 4.6).

    The file is a table or JSON objects on lines, in any format of `minbert.data.formats`. The label of a row is that of
    its original, the training example with its id; without one, or with several that differ, it needs its own. Rows
    with an empty text or the text of their original are skipped.

    Args:
        path: the file.
        task: the task of its columns and labels.
        originals: the task's training examples.
        held_out: ids of examples that must not be trained on.
        leave_out: leave out the rows that are made from them, as a fold's run must; else such a row is an error.

    Raises:
        UserError: the file cannot be read, or a row, named by its line, cannot be used.
    """
    labels: dict[str, set[LabelValue]] = {}  # of the originals with an id
    texts: dict[str, set[tuple[str, ...]]] = {}
    columns = zip(*filter(None, (originals.texts, originals.pairs)), strict=True)
    values = [] if originals.labels is None else map(_value, originals.labels.tolist())
    for identity, label, sentences in zip(originals.ids, values, columns, strict=True):
        labels.setdefault(identity, set()).add(label)
        texts.setdefault(identity, set()).add(sentences)
    kept, skipped = [], []
    for row in read_rows(path, task):
        where = f"{path}, line {row.line}"
        sentences = tuple(text.strip() for text in row.texts)
        if not row.problem and not all(sentences):
            skipped.append(Skipped(str(path), row.line, "empty text", row.id))
            continue
        if row.id in held_out and row.id not in labels:
            if leave_out:
                continue
            raise UserError(
                f"{where}: {row.id} is an example of the dev split; train on sentences made from train alone"
            )
        try:
            label = _label(check_row(row), task, labels.get(row.id, set()))
        except ValueError as error:
            raise UserError(f"{where}: {one_line(str(error))}") from None
        if sentences in texts.get(row.id, set()):
            skipped.append(Skipped(str(path), row.line, "the same as its original", row.id))
        else:
            kept.append((row.id, sentences, label))
    if not kept:
        raise UserError(f"{path} has no example that is not in the training data")
    return Examples(
        [identity for identity, _, _ in kept],
        [sentences[0] for _, sentences, _ in kept],
        [sentences[1] for _, sentences, _ in kept] if task.is_pair else None,
        np.array([label for _, _, label in kept], np.float32),
        skipped,
    )


def _value(label: float | list[float]) -> LabelValue:
    return tuple(label) if isinstance(label, list) else label


def _label(row: Row, task: Task, known: set[LabelValue]) -> LabelValue:
    """The label of a row, or else that of its originals, whose labels are `known`.

    Raises:
        ValueError: there is none, or it differs from theirs.
    """
    given = bool(split_labels(row.label, task.separator)) if task.is_multilabel else bool(str(row.label or "").strip())
    found = " and ".join(_shown(label, task) for label in sorted(known))
    if not given and len(known) == 1:
        return next(iter(known))
    if not given and known:
        raise ValueError(f"no label, and the training examples with the id {row.id!r} have {found}; give it one")
    try:
        label = _value(LabelEncoder(task)(row.label))
    except ValueError as error:
        raise ValueError(f"{error}, nor a training example with the id {row.id!r}") from None
    if known and not any(np.allclose(label, each) for each in known):
        raise ValueError(f"label {_shown(label, task)} differs from its original's, {found} (id {row.id})")
    return label


def _shown(label: LabelValue, task: Task) -> str:
    (value,) = decode_labels(task, np.array([label]))
    if isinstance(value, list):
        return short(", ".join(map(str, value)))
    return f"{value:g}" if isinstance(value, float) else short(value)
