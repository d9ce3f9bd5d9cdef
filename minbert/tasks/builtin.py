"""The built-in tasks. A new task is one more record: docs/extending.md."""

from __future__ import annotations

from collections.abc import Sequence

from minbert.errors import UserError, did_you_mean
from minbert.tasks.task import Glue, Task


def _splits(stem: str) -> dict[str, str]:
    return {"train": f"{stem}-train.csv", "dev": f"{stem}-dev.csv", "test": f"{stem}-test-student.csv"}


_ALL = (
    Task(
        name="sst",
        title="SST-5 sentiment",
        columns=("sentence",),
        label="sentiment",
        max_label=4,
        loss="cross_entropy",
        prediction_stem="sst",
        prediction_column="Predicted_Sentiment",
        files=_splits("ids-sst"),
    ),
    Task(
        name="qqp",
        title="Quora paraphrase",
        columns=("sentence1", "sentence2"),
        label="is_duplicate",
        max_label=1,
        loss="binary_cross_entropy",
        prediction_stem="para",
        prediction_column="Predicted_Is_Paraphrase",
        files=_splits("quora"),
        glue=Glue("QQP", ("question1", "question2"), "is_duplicate", "qqp"),
    ),
    Task(
        name="sts",
        title="STS-B similarity",
        columns=("sentence1", "sentence2"),
        label="similarity",
        max_label=5,
        loss="mean_squared_error",
        prediction_stem="sts",
        prediction_column="Predicted_Similiary",  # the spelling of the course's files
        metric="pearson",
        files=_splits("sts"),
        glue=Glue("STS-B", ("sentence1", "sentence2"), "score", "stsb"),
    ),
    Task(
        name="cfimdb",
        title="CFIMDB sentiment",
        columns=("sentence",),
        label="sentiment",
        max_label=1,
        loss="binary_cross_entropy",
        prediction_stem="cfimdb",
        prediction_column="Predicted_Sentiment",
        files=_splits("ids-cfimdb"),
        in_overall=False,
    ),
    Task(
        name="sst2",
        title="SST-2 sentiment",
        columns=("sentence",),
        label="label",
        max_label=1,
        loss="binary_cross_entropy",
        prediction_stem="sst2",
        prediction_column="Predicted_Sentiment",
        glue=Glue("SST-2", ("sentence",), "label", "sst2"),
    ),
    Task(  # its data: minbert/data/star_reviews.py
        name="yelp",
        title="5-star reviews",
        columns=("text",),
        label="stars",
        max_label=4,
        loss="cross_entropy",
        prediction_stem="yelp",
        prediction_column="Predicted_Stars",
        in_overall=False,
        evaluated=False,
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The records of the named tasks, in that order.

    Raises:
        UserError: an unknown name, the same name twice, or no name.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}{did_you_mean(name, list(TASKS))}; known: {', '.join(TASKS)}")
    if not names or len(set(names)) != len(names):
        raise UserError(f"tasks must be one or more different names, got {list(names)}; known: {', '.join(TASKS)}")
    return [TASKS[name] for name in names]
