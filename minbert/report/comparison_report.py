"""The report of several runs: one table of rows and metrics, with published figures beside ours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minbert.report.html_page import write_page
from minbert.report.training_charts import palette, training_figures
from minbert.report.training_history import options
from minbert.runs.epochs import epochs
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS, Task
from minbert.tasks.task import ERRORS, METRICS


@dataclass(frozen=True)
class Row:
    """A system of a table.

    Args:
        label: what the table calls it.
        published: its figures by column (`our_scores`), or by any other name; None where the table has none.
        run: ours, finished or not; None where there is none.
        note: what a reader should know of it.
        ours: scores of our run by column, where its directory is gone; else they are read from there.
    """

    label: str
    published: Mapping[str, float | None] = field(default_factory=dict)
    run: Run | None = None
    note: str = ""
    ours: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A figure, published and ours, each None if there is none; and where it lies between the column's ends, 0 to 1."""

    published: float | None
    ours: float | None
    published_at: float = 0.0
    ours_at: float = 0.0
    best_published: bool = False
    best_ours: bool = False

    @property
    def difference(self) -> float | None:
        """Ours less the published one."""
        return None if self.published is None or self.ours is None else self.ours - self.published


@dataclass(frozen=True)
class Column:
    """A metric of all systems: its title, the metric's name (empty of what is no task's) and a cell for each row."""

    name: str
    title: str
    metric: str
    cells: list[Cell]


def write_comparison(path: str | Path, title: str, rows: Sequence[Row]) -> Path:
    """Write one page for several systems: the table, best figures marked, and each run's details folded below.

    Raises:
        UserError: a file of a run is damaged, or the disk is full.
    """
    path = Path(path)
    tasks = tasks_of(row.run for row in rows)
    return write_page(
        path,
        "comparison.html",
        title=title,
        rows=rows,
        columns=columns(rows, [row.ours or our_scores(row.run, tasks) for row in rows], tasks),
        details=[details(row.label, row.run, path) for row in rows if row.run is not None],
    )


def tasks_of(runs: Iterable[Run | None]) -> dict[str, Task]:
    """The built-in tasks, and the runs' own tasks; of several of one name the first."""
    own: dict[str, Task] = {}
    for run in runs:
        config = run.config() if run is not None else None
        if config is not None and config.tasks:
            own = {task.name: task for task in config.find(config.tasks)} | own
    return {**TASKS, **own}


def our_scores(run: Run | None, tasks: Mapping[str, Task] = TASKS) -> dict[str, float]:
    """Scores of the best epoch by column; none of a run that has not finished.

    A column is "sst" for the metric that decides, "sst f1" for a further one, "overall" for all tasks, and
    "sst test", "sst f1 test" and "overall test" for the test split.

    Args:
        tasks: by name, whose first metrics decide; of a task that is not there it is the run's own first metric.
    """
    summary = run.summary() if run is not None else {}
    found: dict[str, float] = {}
    for split, mark in (("dev", ""), ("test", " test")):
        for name, scores in summary.get(split, {}).items():
            if name == "overall":
                found[f"overall{mark}"] = scores
                continue
            decides = tasks[name].metric if name in tasks else next(iter(scores))
            for metric, score in scores.items():
                found[f"{name}{mark}" if metric == decides else f"{name} {metric}{mark}"] = score
    return found


def columns(
    rows: Sequence[Row], ours: Sequence[Mapping[str, float]], tasks: Mapping[str, Task] = TASKS
) -> list[Column]:
    """The columns: each task's first metric, then overall, further metrics, and what else was published."""
    published = dict.fromkeys(name for row in rows for name in row.published)
    found = dict.fromkeys(name for scores in ours for name in scores)
    dev = [*tasks, "overall"]
    further = [f"{task} {metric}" for task in tasks for metric in METRICS if f"{task} {metric}" in found]
    order = dict.fromkeys([*dev, *further, *published, *(f"{name} test" for name in [*dev, *further]), *found])
    return [
        _column(name, [row.published.get(name) for row in rows], [scores.get(name) for scores in ours], tasks)
        for name in order
        if name in published or name in found
    ]


def _column(
    name: str, published: Sequence[float | None], ours: Sequence[float | None], tasks: Mapping[str, Task]
) -> Column:
    known = [value for value in (*published, *ours) if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    title, metric = _heading(name, tasks)
    best_of = min if metric in ERRORS else max

    def at(value: float | None) -> float:
        return 0.5 if value is None or high == low else (value - low) / (high - low)

    best, ours_best = (
        best_of((value for value in values if value is not None), default=float("nan")) for values in (published, ours)
    )
    cells = [
        Cell(theirs, mine, at(theirs), at(mine), theirs == best, mine == ours_best)
        for theirs, mine in zip(published, ours, strict=True)
    ]
    return Column(name, title, metric, cells)


def _heading(name: str, tasks: Mapping[str, Task]) -> tuple[str, str]:
    """Title and metric of a column; no metric where it is no task's."""
    task, *rest = name.removesuffix(" test").split(" ")
    if task not in tasks or rest[1:] or (rest and rest[0] not in METRICS):
        return name, ""
    return tasks[task].title + (", test" if name.endswith(" test") else ""), rest[0] if rest else tasks[task].metric


def details(label: str, run: Run, page: Path) -> dict[str, Any]:
    """What the page shows of a run below the table."""
    records, config = run.metrics.records(), run.config()
    report = run.path / "report.html"
    return {
        "label": label,
        "epochs": epochs(records),
        "best_epoch": run.summary().get("best_epoch", 0),  # 0 for an unfinished run
        "options": [option for option in options(config) if option.changed or option.resolved],
        "figures": training_figures(records, palette(config.tasks or [])),
        "link": Path(os.path.relpath(report, page.parent)).as_posix() if report.exists() else "",
    }
