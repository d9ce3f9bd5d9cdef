"""Submission files of the GLUE benchmark: a table of index and prediction for each task's test set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minbert.data import Examples
from minbert.files.atomic import write_atomically, writing
from minbert.tasks import Task
from minbert.tasks.labels import decode_labels
from minbert.tasks.metrics import predictions

SHOWN = 5  # indices that a warning names


def is_of_glue(task: Task, examples: Examples) -> bool:
    """Whether examples were read from GLUE's folder of a task, or from its configuration on the hub."""
    file = Path(examples.file)
    if task.glue is None or (task.course and file.name in task.course.files.values()):
        return False
    return file.parent.name in (task.glue.folder, task.glue.hub)


def write_submission(directory: Path, task: Task, examples: Examples, outputs: np.ndarray) -> tuple[Path, list[str]]:
    """Write a task's submission file: a line for every row of its test file, in the file's order, from index 0.

    Classes are as in GLUE's files, similarities are between 0 and 5 with three decimals. A skipped row gets the
    commonest predicted class, or the mean similarity.

    Args:
        examples: all of the test file, for which `is_of_glue` holds.
        outputs: the head's for each of them, [n, C] or [n].

    Returns:
        the file, and a warning if there are skipped rows.

    Raises:
        UserError: the disk is full.
    """
    assert task.glue is not None
    assert examples.lines is not None
    predicted = predictions(task, outputs)
    if task.is_regression:
        scores = np.array(decode_labels(task, predicted)).clip(*task.scale)
        values, default = [f"{score:.3f}" for score in scores], f"{scores.mean():.3f}"
    else:
        values = list(map(str, decode_labels(task, predicted)))
        default = str(decode_labels(task, np.array([np.bincount(predicted).argmax()]))[0])
    by_line = dict(zip(examples.lines.tolist(), values, strict=True))
    lines = sorted([*by_line, *(row.line for row in examples.skipped)])
    rows = [f"{index}\t{by_line.get(line, default)}\n" for index, line in enumerate(lines)]
    path = directory / f"{task.glue.submission}.tsv"
    with writing(path, "free some space and run minbert evaluate"):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(["index\tprediction\n", *rows]))
    absent = [str(index) for index, line in enumerate(lines) if line not in by_line]
    if not absent:
        return path, []
    named = ", ".join(absent[:SHOWN]) + (f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else "")
    usual = "the mean prediction" if task.is_regression else "the commonest prediction"
    return path, [f"warning: {path.name}: a row that was left out has {usual}, {default}: index {named}"]
