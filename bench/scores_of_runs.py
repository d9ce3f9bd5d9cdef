"""What the scripts share that compare systems by dev scores: what a run came to, the runs of a system, and a table."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training_runs import make, training_errors, with_deviation

from minbert.errors import UserError
from minbert.files.atomic import write_json, writing
from minbert.files.json_yaml import read_json
from minbert.files.schema_checks import checked
from minbert.report.run_result import RunResult, read_results
from minbert.tasks import TASKS
from minbert.training.recorded_runs import PlannedRun, finish_runs


@dataclass(frozen=True)
class Row:
    """The runs of a system, one for each seed."""

    name: str
    runs: Sequence[RunResult]

    @property
    def overall(self) -> list[float]:
        """By seed, that of the best epoch on dev; of a single task its score."""
        return [run.scores.get("dev overall", next(iter(run.scores.values()))) for run in self.runs]

    @property
    def seconds(self) -> float:
        """Of all steps, from a run's median one; the least over the seeds, as other work on the machine only adds."""
        return min(run.steps * run.step_seconds for run in self.runs)

    @property
    def step_seconds(self) -> float:
        """The median of a run's steps; the least over the seeds."""
        return min(run.step_seconds for run in self.runs)

    def record(self, first: Row) -> dict[str, object]:
        """The row of a record; `seconds` is the least over the seeds, other numbers are means."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "overall": statistics.mean(self.overall),
            "overall_deviation": statistics.stdev(self.overall) if len(self.runs) > 1 else None,
            "less_first": statistics.mean(self.less(first)),
            "runs": [asdict(run) for run in self.runs],
        }

    def less(self, first: Row) -> list[float]:
        """The difference of the overall scores from another row's, by seed."""
        return [own - other for own, other in zip(self.overall, first.overall, strict=True)]

    def mean(self, name: str) -> str:
        """The mean over the seeds of a share that not every system has, as the table shows it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return f"{statistics.mean(values):.2f}" if values else "-"


def read_table(file: Path) -> dict[str, dict[int, RunResult]]:
    """The results in a file by the runs' name and seed; none where there is no file.

    Raises:
        UserError: it is damaged.
    """
    remedy, content = "restore it, or give another --table", {}
    if file.exists():
        content = read_json(file, remedy)
    try:
        return {name: read_results(checked(row, dict[str, Any], name), name) for name, row in content.items()}
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}") from None


def trained(
    systems: Sequence[str],
    options: argparse.Namespace,
    given: Callable[[str, int], tuple[Path, list[str]]],
) -> list[Row]:
    """Train a run of each system and seed, as many at once as the options say, unless the table of the options has it.

    Args:
        given: of a system and seed, the directory and the arguments of minbert.train.

    Raises:
        UserError: minbert.train refuses the options or the data, or fails; a run has no dev scores.
    """
    file = options.table or options.runs / "table.json"
    make(file.parent, "--table")
    recorded, of_system = read_table(file), {}

    def results(run: PlannedRun) -> dict[int, RunResult]:
        return recorded.setdefault(str(run.directory.parent.relative_to(options.runs)), {})

    def begin(run: PlannedRun) -> None:
        print(run.name, flush=True)

    def end(run: PlannedRun, outcome: RunResult | UserError) -> None:
        if isinstance(outcome, UserError):
            raise outcome
        if not any(name.startswith("dev ") for name in outcome.scores):
            raise UserError(f"{run.directory} has no dev scores: the data needs a dev split")
        results(run)[run.seed] = outcome
        with writing(file.parent, "free some space"):
            write_json(file, {name: {"runs": [*map(asdict, of.values())]} for name, of in recorded.items()})

    for system in systems:
        planned = [PlannedRun(f"{system}, seed {seed}", *given(system, seed), seed) for seed in options.seeds]
        of_system[system] = [replace(run, recorded=results(run).get(run.seed)) for run in planned]
    with training_errors():
        runs = [run for runs in of_system.values() for run in runs]
        finish_runs(runs, file, options.jobs, begin, end, delete_checkpoints=options.delete_checkpoints)
    return [Row(system, [results(run)[run.seed] for run in runs]) for system, runs in of_system.items()]


def made_on(rows: Sequence[Row]) -> dict[str, object]:
    """The machines and commits of the runs, for a record."""
    runs = [run for row in rows for run in row.runs]
    return {"machines": sorted({run.machine for run in runs}), "commits": sorted({str(run.commit) for run in runs})}


def footnote(rows: Sequence[Row]) -> str:
    """The same for people, with the seeds that ran there."""
    runs = [run for row in rows for run in row.runs]
    lines = []
    for machine, commit in sorted({(run.machine, run.commit or "unknown") for run in runs}):
        seeds = {run.seed for run in runs if (run.machine, run.commit or "unknown") == (machine, commit)}
        lines.append(f"- {machine}; commit {commit}: seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}")
    return "\n".join(lines) + "\n"


def table(kind: str, rows: Sequence[Row], further: Mapping[str, Callable[[Row], str]], *, digits: int = 4) -> list[str]:
    """The lines of a Markdown table: means over the seeds, with the deviation of the sample where there are several.

    Args:
        kind: what the rows are, the first column's header.
        further: by header, what further columns show of a row.
        digits: of the scores.
    """
    first = rows[0]
    tasks = [task for task in TASKS if f"dev {task}" in first.runs[0].scores]
    columns = [kind, *tasks, "overall", f"less {first.name}", *further]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [
            *(with_deviation([run.scores[f"dev {task}"] for run in row.runs], digits=digits) for task in tasks),
            with_deviation(row.overall, digits=digits),
            "" if row is first else with_deviation(row.less(first), digits=digits, sign="+"),
            *(shown(row) for shown in further.values()),
        ]
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    return lines
