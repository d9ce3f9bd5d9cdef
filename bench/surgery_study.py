"""Dev scores, seconds and conflicts by surgery: `python bench/surgery_study.py --data DIR --model DIR --runs DIR`.

Trains a run for each surgery and seed, one after another, and writes a table with a row for each surgery. Runs of one
seed have the same data order and the same new weights whatever the surgery, so the difference from the first surgery is
taken seed by seed. A finished run is used again, and an interrupted one goes on.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training_runs import Parser, check, command_line, require_distinct, train, with_deviation, write

from minbert import cli
from minbert.errors import UserError, require
from minbert.methods.surgery import NAMES
from minbert.methods.weightings import WEIGHTINGS
from minbert.runs.epochs import epochs
from minbert.runs.run_directory import Run
from minbert.training.stop_signal import StopSignal

SURGERIES = (*NAMES, *(name for name in WEIGHTINGS if name != "constant"))  # which has no weights of its own


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


@dataclass(frozen=True)
class Row:
    """The runs of a surgery, one for each seed."""

    surgery: str
    runs: Sequence[Outcome]

    def record(self, first: Row) -> dict[str, object]:
        """The row of a record; `seconds` is the median over the seeds, other numbers are means."""
        return {
            "benchmark": "surgery_study",
            "case": "dev scores",
            "name": self.surgery,
            "seconds": statistics.median(run.seconds for run in self.runs),
            "overall": statistics.mean(run.overall for run in self.runs),
            "overall_deviation": statistics.stdev(run.overall for run in self.runs) if len(self.runs) > 1 else None,
            "less_first": statistics.mean(self.less(first)),
            "runs": [asdict(run) for run in self.runs],
        }

    def less(self, first: Row) -> list[float]:
        """The difference of the overall scores from another row's, by seed."""
        return [run.overall - other.overall for run, other in zip(self.runs, first.runs, strict=True)]

    def mean(self, name: str) -> str:
        """The mean over the seeds of a share that not every surgery has, as the table shows it."""
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
    step_seconds = statistics.median(sum(record["seconds"].values()) for record in records if "seconds" in record)
    return Outcome(
        seed=seed,
        steps=summary["steps"],
        scores=scored[-1].scores,
        overall=scored[-1].overall,
        seconds=summary["steps"] * step_seconds,
        conflict_rate=statistics.mean(rates) if rates else None,
        projected_share=statistics.mean(shares) if shares else None,
    )


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: means over the seeds, with the deviation of the sample where there are several."""
    first, tasks = rows[0], list(rows[0].runs[0].scores)
    columns = ["surgery", *tasks, "overall", f"less {first.surgery}", "seconds", "conflicts", "projected"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [
            *(with_deviation([run.scores[task] for run in row.runs]) for task in tasks),
            with_deviation([run.overall for run in row.runs]),
            "" if row is first else with_deviation(row.less(first), sign="+"),
            f"{statistics.median(run.seconds for run in row.runs):.0f}",
            row.mean("conflict_rate"),
            row.mean("projected_share"),
        ]
        lines.append(f"| {' | '.join([row.surgery, *cells])} |")
    seeds = len(first.runs)
    lines += ["", f"Of {seeds} seed{'s' if seeds > 1 else ''}, {first.runs[0].steps} steps each."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    made = Parser("surgery_study.py", (__doc__ or "").partition(":")[0], "runs/surgery-study")
    made.add_argument(
        "--surgeries",
        nargs="+",
        default=list(SURGERIES),
        help="names for --surgery, each perhaps with further options: sum 'cagrad(c=0.5)' 'pcgrad --surgery-groups=..';"
        " the others' scores are compared with the first one's (all that minbert has)",
    )
    made.add_argument("--epochs", type=int, default=1, help="of each run (%(default)s)")
    options = made.parse_args(arguments)
    require_distinct(options, "surgeries", "seeds")
    directories = {text: re.sub(r"[^\w.=+]+", "-", text).strip("-") for text in options.surgeries}
    same = len(set(directories.values())) < len(directories)
    require(not same, "surgeries", "a list of which no two have one directory", ", ".join(directories))

    def given(surgery: str, seed: int) -> tuple[Path, list[str]]:
        directory = options.runs / directories[surgery] / f"seed-{seed}"
        name, *further = re.split(r"\s+(?=--)", surgery)
        own = {"surgery": name, "epochs": options.epochs, "seed": seed, "out": directory}
        return directory, [*command_line(options, own), *further]

    check([given(surgery, seed)[1] for surgery in options.surgeries for seed in options.seeds], options.runs)
    rows = []
    with StopSignal():
        for surgery in options.surgeries:
            runs = []
            for seed in options.seeds:
                print(f"{surgery}, seed {seed}", flush=True)
                runs.append(outcome(train(*given(surgery, seed)), seed))
            rows.append(Row(surgery, runs))
    text = table(rows)
    print(text, end="")
    write(
        "Dev scores by surgery",
        ["python bench/surgery_study.py", shlex.join(arguments)],
        [row.record(rows[0]) for row in rows],
        text,
        Run(given(options.surgeries[0], options.seeds[0])[0]),
        options.results,
        options=options.options,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
