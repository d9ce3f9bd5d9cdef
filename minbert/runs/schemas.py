"""What is read of a run directory, which may come from anywhere: every value is checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minbert.errors import UserError
from minbert.files.json_yaml import read_json, read_lines, short
from minbert.files.validation import build, checked, without_format
from minbert.task_options import check_known
from minbert.tasks import TASKS, Task

Record = dict[str, Any]
Numbers = dict[str, float | None]  # None for what was not finite

LINE: dict[str, Any] = {  # of metrics.jsonl
    **dict.fromkeys(("step", "epoch"), int),
    **dict.fromkeys(("lr", "grad_norm", "smart_share", "perturbation", "projected_share"), float | None),
    **dict.fromkeys(("examples_per_second", "bytes_sent"), float | None),
    **dict.fromkeys(("loss", "smart", "bregman", "cosine", "magnitude_similarity"), Numbers),
    **dict.fromkeys(("train_loss", "conflict_rate"), Numbers),
    "seconds": dict[str, float],
}
SUMMARY: dict[str, Any] = {
    **dict.fromkeys(("best_epoch", "steps", "steps_per_epoch", "skipped_steps", "examples"), int),
    "parameters": int,
    "peak_memory_bytes": int | None,  # None: the system keeps no count
    **dict.fromkeys(("seconds", "examples_per_second"), float),
    **dict.fromkeys(("device", "precision"), str),
    **dict.fromkeys(("backends", "versions"), dict[str, str]),
}
Scores = dict[str, dict[str, float]]
ScoresAndOverall = dict[str, float | dict[str, float]]


@dataclass(frozen=True)
class Prediction:
    """What a run says of one example."""

    id: str
    predicted: float
    tokens: int  # that the model read
    label: float | None = None
    probabilities: list[float] | None = None  # of each class; None for a task without classes


def check_links(directory: Path) -> None:
    """Refuse a run directory with links that lead out of it: a command would read, or write, what nobody named.

    Raises:
        UserError: there is one; it is named.
    """
    root = os.path.realpath(directory)
    for folder, names, files in os.walk(directory):
        for name in (*names, *files):
            path = os.path.join(folder, name)
            if os.path.islink(path) and os.path.commonpath((root, os.path.realpath(path))) != root:
                raise UserError(
                    f"{path} is a link to {os.readlink(path)}, outside the run directory; put a copy in its place"
                )


def read_metrics(path: Path) -> tuple[list[Record], list[str]]:
    """The lines of metrics.jsonl that can be used, and what is wrong with each other line.

    A last line without its end, which a crash cut short, counts as neither.

    Raises:
        UserError: the file cannot be read.
    """
    records, problems = [], []
    for number, line in read_lines(path):
        try:
            if isinstance(line, ValueError):
                raise line
            records.append(_check_line(line))
        except (ValueError, UserError) as error:
            problems.append(f"{path}, line {number}: {error}")
            last = number
    if problems and last == len(records) + len(problems) and not _ends_with_line(path):
        problems.pop()
    return records, problems


def _ends_with_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _check_line(record: Record) -> Record:
    for name in ("step", "epoch"):
        if name not in record:
            raise UserError(f"no {name}")
    for name in LINE.keys() & record.keys():
        checked(record[name], LINE[name], name)
    _require(record["step"] >= 0 and record["epoch"] >= 1, "step and epoch", "0 and 1 or more", record["step"])
    if "dev" in record:
        check_scores_and_overall(record["dev"], "dev")
        if "train_loss" not in record:
            raise UserError("no train_loss")
    return record


def read_summary(path: Path) -> Record:
    """What summary.json holds, checked.

    Raises:
        UserError: it is damaged, or a later minbert wrote it.
    """
    remedy = "--resume of the run writes it anew"
    summary = without_format(read_json(path, remedy=remedy), str(path))
    try:
        for name, kind in SUMMARY.items():
            if name not in summary:
                raise UserError(f"no {name}")
            checked(summary[name], kind, name)
        for name in ("dev", "test"):
            if name == "dev" or name in summary:
                check_scores_and_overall(summary.get(name), name)
        for name in ("best_epoch", "steps", "steps_per_epoch"):
            _require(summary[name] >= 1, name, "1 or more", summary[name])
        for name in ("skipped_steps", "examples", "peak_memory_bytes", "parameters", "examples_per_second"):
            _require((summary[name] or 0) >= 0, name, "0 or more", summary[name])
        _require(summary["seconds"] > 0, "seconds", "more than 0", summary["seconds"])
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None
    return summary


def check_scores_and_overall(scores: Any, where: str) -> None:
    """Check `{task: {metric: score}, "overall": score}`; raises a UserError that starts with `where`."""
    checked(scores, ScoresAndOverall, where)
    checked(scores.get("overall"), float, f"{where}.overall")
    check_scores({name: each for name, each in scores.items() if name != "overall"}, where)


def check_scores(scores: Any, where: str) -> None:
    """Check `{task: {metric: score}}` of at least one task; raises a UserError that starts with `where`."""
    checked(scores, Scores, where)
    _require(bool(scores), where, "the scores of a task", scores)
    for name, each in scores.items():
        check_known(where, "task", name, TASKS)
        _require(list(each) == [TASKS[name].metric], f"{where}.{name}", f"{TASKS[name].metric} alone", list(each))


def read_predictions(path: Path, task: Task, remedy: str) -> list[Prediction]:
    """The predictions of a task in a file, in their order.

    Raises:
        UserError: it is damaged; the line ends with `remedy`.
    """
    found = []
    for number, line in read_lines(path, remedy):
        try:
            if isinstance(line, ValueError):
                raise line
            found.append(_prediction(line, task))
        except (ValueError, UserError) as error:
            raise UserError(f"{path} is damaged (line {number}: {error}); {remedy}") from None
    return found


def _prediction(values: Mapping[str, Any], task: Task) -> Prediction:
    found = build(Prediction, values, task.name)
    _require(found.tokens >= 0, "tokens", "0 or more", found.tokens)
    for name, value in (("predicted", found.predicted), ("label", found.label)):
        if value is not None and not task.is_scored:
            _require(value in range(task.top + 1), name, f"a class from 0 to {task.top}", value)
    _require(found.label is None or 0 <= found.label <= task.top, "label", f"0 to {task.top}", found.label)
    classes = found.probabilities
    if classes is not None:
        fits = not task.is_scored and len(classes) == task.top + 1 and all(0 <= each <= 1 for each in classes)
        _require(fits, "probabilities", f"{task.top + 1} shares", classes)
    return found


def _require(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise UserError(f"{name}: expected {expected}, got {short(got)}")
