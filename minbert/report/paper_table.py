"""A paper's table with its published figures beside ours: on the terminal, table.md, table.json and report.html."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table

from minbert.files.atomic import write_atomically, write_json
from minbert.recipes import Paper, Row
from minbert.report import comparison_report
from minbert.runs.run_directory import Run

HOURS = "hours an epoch"


@dataclass(frozen=True)
class RowResult:
    """The runs of a row of the table."""

    row: Row
    runs: list[Run] = field(default_factory=list)  # one for each seed that has finished
    failures: list[str] = field(default_factory=list)  # one for each other seed

    def found(self) -> dict[str, list[float]]:
        """Our scores, one for each seed: by column, as `columns` names them, and further metrics as "dev sst f1"."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            summary = run.summary()
            single = [split for split in ("dev", "test") if len(summary.get(split, {})) <= 2]  # the overall is its one
            for name, score in comparison_report.our_scores(run).items():
                split = "test" if name.endswith(" test") else "dev"
                name = name.removesuffix(" test")
                if name != "overall" or split not in single:
                    found.setdefault(f"{split} {name}", []).append(score)
            found.setdefault(HOURS, []).append(
                summary["seconds"] / summary["steps"] * summary["steps_per_epoch"] / 3600
            )
        return found

    def published(self) -> dict[str, float]:
        """The paper's scores by column."""
        scores = {f"{split} {name}": score for split, by in self.row.published.items() for name, score in by.items()}
        return scores if self.row.hours is None else {**scores, HOURS: self.row.hours}


def columns(results: Sequence[RowResult]) -> list[str]:
    """Names of the columns: each task's first metric on dev, then test scores and hours where the paper has them."""
    present = {name for result in results for name in (*result.published(), *result.found())}
    if not any(HOURS in result.published() for result in results):
        present.discard(HOURS)
    tasks = comparison_report.tasks_of(run for result in results for run in result.runs)
    order = [f"{split} {name}" for split in ("dev", "test") for name in (*tasks, "overall")]
    return [name for name in (*order, HOURS) if name in present]


def cells(result: RowResult, names: Sequence[str]) -> list[str]:
    """The published score and ours of each column."""
    published, found = result.published(), result.found()
    shown = []
    for name in names:
        theirs = f"{published[name]:.3f}" if name in published else "–"
        ours = f"{statistics.fmean(found[name]):.3f}" if name in found else "–"
        if len(found.get(name, ())) > 1:
            ours += f" ±{statistics.stdev(found[name]):.3f}"
        shown.append(f"{theirs} / {ours}" if name in published or name in found else "")
    return shown


def terminal_table(found: Paper, results: Sequence[RowResult]) -> Table:
    """The paper's table for the terminal."""
    names = columns(results)
    shown = Table(box=box.SIMPLE_HEAD, title=found.title, title_justify="left", title_style="bold")
    shown.add_column("published / ours", min_width=16)
    for name in names:
        shown.add_column(name)
    for result in results:
        failed = f" ({len(result.failures)} failed)" if result.failures else ""
        shown.add_row(result.row.title + failed, *cells(result, names))
    return shown


def write_tables(out: Path, found: Paper, results: Sequence[RowResult]) -> None:
    """Write table.md, table.json and report.html, with the runs so far."""
    names = columns(results)
    lines = [f"| published / ours | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {' | '.join([result.row.title, *cells(result, names)])} |" for result in results]
    failures = [f"- {result.row.title}: {failure}" for result in results for failure in result.failures]
    text = "\n".join([f"# {found.title}", "", *lines, "", *failures]).rstrip() + "\n"
    write_atomically(out / "table.md", text)
    record = {
        result.row.name: {
            "title": result.row.title,
            "published": result.published(),
            "ours": result.found(),
            "failures": result.failures,
        }
        for result in results
    }
    write_json(out / "table.json", record)
    rows = []
    for result in results:
        published = {
            name if split == "dev" else f"{name} {split}": score
            for split, scores in result.row.published.items()
            for name, score in scores.items()
        }
        note, runs = "; ".join(result.failures), list[Run | None](result.runs) or [None]
        rows += [comparison_report.Row(result.row.title, published, run, note) for run in runs]
    comparison_report.write_comparison(out / "report.html", found.title, rows)
