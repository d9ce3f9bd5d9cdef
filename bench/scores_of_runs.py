"""What the scripts share that compare systems by dev scores: what a run came to, the runs of a system, and a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training_runs import train, with_deviation

from minbert.errors import UserError
from minbert.runs.epochs import epochs
from minbert.runs.run_directory import Run


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    seed: int
    steps: int
    scores: Mapping[str, float]  # dev, after the last epoch: each task's first metric
    overall: float
    seconds: float  # of all steps, from the median of those that were logged: what ran beside some does not count
    conflict_rate: float | None  # share of the steps and pairs whose gradients conflicted; None without a gradient each
    projected_share: float | None  # mean over the steps that were logged

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps


@dataclass(frozen=True)
class Row:
    """The runs of a system, one for each seed."""

    name: str
    runs: Sequence[Outcome]

    @property
    def seconds(self) -> float:
        """The median over the seeds, as is that of a step."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def step_seconds(self) -> float:
        return statistics.median(run.step_seconds for run in self.runs)

    def record(self, first: Row) -> dict[str, object]:
        """The row of a record; `seconds` is the median over the seeds, other numbers are means."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "overall": statistics.mean(run.overall for run in self.runs),
            "overall_deviation": statistics.stdev(run.overall for run in self.runs) if len(self.runs) > 1 else None,
            "less_first": statistics.mean(self.less(first)),
            "runs": [asdict(run) for run in self.runs],
        }

    def less(self, first: Row) -> list[float]:
        """The difference of the overall scores from another row's, by seed."""
        return [run.overall - other.overall for run, other in zip(self.runs, first.runs, strict=True)]

    def mean(self, name: str) -> str:
        """The mean over the seeds of a share that not every system has, as the table shows it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return f"{statistics.mean(values):.2f}" if values else "-"


def outcome(run: Run, seed: int) -> Outcome:
    """What a finished run came to, from its metrics.jsonl and summary.json.

    Raises:
        UserError: a line is damaged, or the data has no dev split.
    """
    records, summary = run.metrics.records(), run.summary()
    scored = epochs(records)
    if not scored:
        raise UserError(f"{run.path} has no dev scores: the data needs a dev split")
    rates = [rate for epoch in scored for rate in epoch.conflict_rate.values()]
    shares = [share for record in records if (share := record.get("projected_share")) is not None]
    logged = [sum(record["seconds"].values()) for record in records if "seconds" in record]
    return Outcome(
        seed=seed,
        steps=summary["steps"],
        scores=scored[-1].scores,
        overall=scored[-1].overall,
        seconds=summary["steps"] * statistics.median(logged) if logged else summary["seconds"],
        conflict_rate=statistics.mean(rates) if rates else None,
        projected_share=statistics.mean(shares) if shares else None,
    )


def trained(
    systems: Sequence[str], seeds: Sequence[int], given: Callable[[str, int], tuple[Path, list[str]]]
) -> list[Row]:
    """Train a run of each system and seed, one after another.

    Args:
        given: of a system and seed, the directory and the arguments of minbert.train.

    Raises:
        UserError: as `train` and `outcome` do.
    """
    rows = []
    for system in systems:
        runs = []
        for seed in seeds:
            print(f"{system}, seed {seed}", flush=True)
            runs.append(outcome(train(*given(system, seed)), seed))
        rows.append(Row(system, runs))
    return rows


def table(kind: str, rows: Sequence[Row], further: Mapping[str, Callable[[Row], str]]) -> list[str]:
    """The lines of a Markdown table: means over the seeds, with the deviation of the sample where there are several.

    Args:
        kind: what the rows are, the first column's header.
        further: by header, what further columns show of a row.
    """
    first, tasks = rows[0], list(rows[0].runs[0].scores)
    columns = [kind, *tasks, "overall", f"less {first.name}", *further]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [
            *(with_deviation([run.scores[task] for run in row.runs]) for task in tasks),
            with_deviation([run.overall for run in row.runs]),
            "" if row is first else with_deviation(row.less(first), sign="+"),
            *(shown(row) for shown in further.values()),
        ]
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    return lines
