"""A paper's table with its published figures beside ours: on the terminal, table.md, table.json and report.html."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from minbert.errors import UserError
from minbert.files.atomic import write_atomically, write_json
from minbert.files.json_yaml import read_json, short
from minbert.files.schema_checks import checked
from minbert.recipes import Paper, Row
from minbert.report import comparison_report
from minbert.report.run_result import RunResult, read_results
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS

HOURS = "hours an epoch"
FAILURE = re.compile(r"seed (\d{1,18}): (.*)", re.DOTALL)


@dataclass(frozen=True)
class RowResult:
    """What the runs of a row came to."""

    row: Row
    runs: dict[int, RunResult] = field(default_factory=dict)  # by seed, those that have finished
    failures: dict[int, str] = field(
        default_factory=dict
    )  # by seed, of runs that are missing or not what was asked for
    directories: dict[int, Run] = field(default_factory=dict)  # by seed, of runs whose directory is there

    @property
    def counted(self) -> dict[int, RunResult]:
        """The runs that are as asked for, by seed."""
        return {seed: run for seed, run in sorted(self.runs.items()) if seed not in self.failures}

    def found(self) -> dict[str, list[float]]:
        """Our scores, one for each seed: by column, as `columns` names them, and further metrics as "dev sst f1"."""
        found: dict[str, list[float]] = {}
        for run in self.counted.values():
            for name, score in {**run.scores, HOURS: run.hours_per_epoch}.items():
                found.setdefault(name, []).append(score)
        return found

    def published(self) -> dict[str, float]:
        """The paper's scores by column."""
        scores = {f"{split} {name}": score for split, by in self.row.published.items() for name, score in by.items()}
        return scores if self.row.hours is None else {**scores, HOURS: self.row.hours}

    @property
    def lines(self) -> list[str]:
        """The failures, one line each."""
        return [f"seed {seed}: {failure}" for seed, failure in sorted(self.failures.items())]


def columns(results: Sequence[RowResult]) -> list[str]:
    """Names of the columns: each task's first metric on dev, then test scores and hours where the paper has them."""
    present = {name for result in results for name in (*result.published(), *result.found())}
    if not any(HOURS in result.published() for result in results):
        present.discard(HOURS)
    order = [f"{split} {name}" for split in ("dev", "test") for name in (*TASKS, "overall")]
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


def write_tables(out: Path, found: Paper, results: Sequence[RowResult], file: Path) -> None:
    """Write table.md, report.html and `file`, with the runs so far."""
    names = columns(results)
    lines = [f"| published / ours | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {' | '.join([result.row.title, *cells(result, names)])} |" for result in results]
    failures = [f"- {result.row.title}: {line}" for result in results for line in result.lines]
    text = "\n".join([f"# {found.title}", "", *lines, "", *failures]).rstrip() + "\n"
    write_atomically(out / "table.md", text)
    record = {
        result.row.name: {
            "title": result.row.title,
            "published": result.published(),
            "ours": result.found(),
            "failures": result.lines,
            "runs": [asdict(run) for _, run in sorted(result.runs.items())],
        }
        for result in results
    }
    write_json(file, record)
    rows = []
    for result in results:
        published = {
            name if split == "dev" else f"{name} {split}": score
            for split, scores in result.row.published.items()
            for name, score in scores.items()
        }
        title, note = result.row.title, "; ".join(result.lines)
        rows += [
            comparison_report.Row(title, published, result.directories.get(seed), note, run.by_column)
            for seed, run in result.counted.items()
        ] or [comparison_report.Row(title, published, None, note)]
    comparison_report.write_comparison(out / "report.html", found.title, rows)


def read_table(file: Path, found: Paper) -> dict[str, RowResult]:
    """The rows of a table.json by name; of a table of an earlier minbert, which kept no runs, none has any.

    Raises:
        UserError: it is damaged, or has a row that the paper has not.
    """
    remedy = "restore it, or give another --table"
    content, results = read_json(file, remedy), {}
    try:
        for name, values in content.items():
            entry: Mapping[str, Any] = checked(values, dict[str, Any], name)
            result = results[name] = RowResult(found.row(name), read_results(entry, name))
            for line in checked(entry.get("failures", []), list[str], f"{name}: failures"):
                if (failure := FAILURE.fullmatch(line)) is None:
                    raise UserError(f"{name}: expected failures of the form 'seed N: why', got {short(line)}")
                result.failures[int(failure[1])] = failure[2]
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}") from None
    return results
