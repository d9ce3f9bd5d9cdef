"""The built-in tasks. A new one is one record in `TASKS` (README, "Add a task")."""

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
        top=4,
        loss="cross_entropy",
        metric="accuracy",
        predictions="sst",
        predicted="Predicted_Sentiment",
        files=_splits("ids-sst"),
    ),
    Task(
        name="qqp",
        title="Quora paraphrase",
        columns=("sentence1", "sentence2"),
        label="is_duplicate",
        top=1,
        loss="binary_cross_entropy",
        metric="accuracy",
        predictions="para",
        predicted="Predicted_Is_Paraphrase",
        files=_splits("quora"),
        glue=Glue("QQP", ("question1", "question2"), "is_duplicate", "qqp"),
    ),
    Task(
        name="sts",
        title="STS-B similarity",
        columns=("sentence1", "sentence2"),
        label="similarity",
        top=5,
        loss="mean_squared_error",
        metric="pearson",
        predictions="sts",
        predicted="Predicted_Similiary",  # spelt so in the course's files
        files=_splits("sts"),
        glue=Glue("STS-B", ("sentence1", "sentence2"), "score", "stsb"),
    ),
    Task(
        name="cfimdb",
        title="CFIMDB sentiment",
        columns=("sentence",),
        label="sentiment",
        top=1,
        loss="binary_cross_entropy",
        metric="accuracy",
        predictions="cfimdb",
        predicted="Predicted_Sentiment",
        files=_splits("ids-cfimdb"),
        headline=False,
    ),
    Task(
        name="sst2",
        title="SST-2 sentiment",
        columns=("sentence",),
        label="label",
        top=1,
        loss="binary_cross_entropy",
        metric="accuracy",
        predictions="sst2",
        predicted="Predicted_Sentiment",
        glue=Glue("SST-2", ("sentence",), "label", "sst2"),
    ),
    Task(  # its data: minbert/data/reviews.py
        name="yelp",
        title="5-star reviews",
        columns=("text",),
        label="stars",
        top=4,
        loss="cross_entropy",
        metric="accuracy",
        predictions="yelp",
        predicted="Predicted_Stars",
        headline=False,
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
