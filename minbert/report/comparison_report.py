"""The report of several runs: one table of rows and metrics, with published figures beside ours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minbert.report.html_page import write_page
from minbert.report.training_charts import palette, training_figures
from minbert.report.training_history import epochs, flat_scores, options
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS


@dataclass(frozen=True)
class Row:
    """A system of a table.

    Args:
        label: what the table calls it.
        published: its figures by metric: sst, qqp, sts, overall for dev scores, or any other name; None where the
            table has none.
        run: ours, finished or not; None where there is none.
        note: what a reader should know of it.
    """

    label: str
    published: Mapping[str, float | None] = field(default_factory=dict)
    run: Run | None = None
    note: str = ""


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


def write_comparison(path: str | Path, title: str, rows: Sequence[Row]) -> Path:
    """Write one page for several systems: the table, best figures marked, and each run's details folded below.

    Raises:
        UserError: a file of a run is damaged, or the disk is full.
    """
    path = Path(path)
    scores = [our_scores(row.run) for row in rows]
    return write_page(
        path,
        "comparison.html",
        title=title,
        rows=rows,
        metrics={name: (TASKS[name].title, TASKS[name].metric) for name in TASKS},
        columns=columns(rows, scores),
        details=[details(row.label, row.run, path) for row in rows if row.run is not None],
    )


def our_scores(run: Run | None) -> dict[str, float]:
    """Scores of the best epoch: dev by task and overall, test by "sst test"; none of a run that has not finished."""
    summary = run.summary() if run is not None else {}
    found: dict[str, float] = {}
    for split, mark in (("dev", ""), ("test", " test")):
        if scores := summary.get(split):
            flat = flat_scores(scores) | {"overall": scores["overall"]}
            found |= {f"{name}{mark}": score for name, score in flat.items()}
    return found


def columns(rows: Sequence[Row], ours: Sequence[Mapping[str, float]]) -> dict[str, list[Cell]]:
    """The cells of each metric: tasks in the task table's order, then overall, then what else was published."""
    published, dev = [name for row in rows for name in row.published], [*TASKS, "overall"]
    named = {*published, *(name for scores in ours for name in scores)}
    return {
        name: _column([row.published.get(name) for row in rows], [scores.get(name) for scores in ours])
        for name in dict.fromkeys([*dev, *published, *(f"{name} test" for name in dev)])
        if name in named
    }


def _column(published: Sequence[float | None], ours: Sequence[float | None]) -> list[Cell]:
    known = [value for value in (*published, *ours) if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)

    def at(value: float | None) -> float:
        return 0.5 if value is None or high == low else (value - low) / (high - low)

    best, ours_best = (
        max((value for value in values if value is not None), default=float("nan")) for values in (published, ours)
    )
    return [
        Cell(theirs, mine, at(theirs), at(mine), theirs == best, mine == ours_best)
        for theirs, mine in zip(published, ours, strict=True)
    ]


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
