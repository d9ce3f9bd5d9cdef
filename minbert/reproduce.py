"""Train the rows of a paper's tables and print them beside the published figures: `minbert reproduce 000`.

Every row and seed is a run of `minbert train --recipe PAPER/ROW` in a separate process, `--jobs` of them at once. The
command skips a finished run, resumes an interrupted one, extends one that is to be longer, and goes on with the next
row when one fails. A run with other options in the same directory is an error, and stays as it is. table.json keeps
what every run came to, so that a finished run's directory can be deleted, and the table go on on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from minbert import cli
from minbert.console import Terminal
from minbert.errors import UserError, require
from minbert.files.atomic import writing
from minbert.files.json_yaml import read_yaml
from minbert.recipes import Paper, Row, paper, protocol
from minbert.report.paper_table import RowResult, read_table, terminal_table, write_tables
from minbert.report.run_result import RunResult
from minbert.runs.run_directory import Run
from minbert.training.recorded_runs import PlannedRun, finish_runs
from minbert.training.stop_signal import Stopped, StopSignal

FILES = {"reviews": "reviews", "augmented": "augmented.sst"}  # what a row may need, as an option of minbert train


@dataclass(frozen=True)
class ReproduceConfig:
    """Train the rows of a paper's tables and print them beside the published figures.

    Args:
        paper: the paper's number: 000 to 004.
        rows: rows to train, by their names; all when left out. `--rows list` prints the names.
        seeds: one run of each row for every seed; the table then has their mean and standard deviation.
        data: as for minbert.train.
        model: likewise.
        protocol: train all rows with as many examples, in batches and at rates for a small encoder, in place of the
            paper's: small (minbert/recipes/protocols).
        options: YAML file of further options of minbert train, for all rows, over those of the recipes and protocol.
        epochs: in place of the paper's.
        steps: likewise, whatever the epochs.
        reviews: file of reviews with stars, for the rows with an auxiliary task (001).
        augmented: file of further sst examples, for the rows with augmented data (002).
        out: directory of the runs; runs/PAPER when left out.
        table: JSON file of what all runs came to, which is read and written: runs that it holds are not trained again,
            wherever they were trained; table.json in --out when left out.
        jobs: runs that train at once, each with its share of the CPU threads. For small encoders on a CPU: threads that
            share a small product wait for each other, and two runs do not.
        delete_checkpoints: delete those of a run that has finished, when the table has it. They take six times the
            memory of the model's weights; scores, records and predictions stay.
    """

    paper: str
    rows: list[str] | None = None
    seeds: list[int] | None = None
    data: str | None = None
    model: str | None = None
    protocol: str | None = None
    options: str | None = None
    epochs: int | None = None
    steps: int | None = None
    reviews: str | None = None
    augmented: str | None = None
    out: str | None = None
    table: str | None = None
    jobs: int = 1
    delete_checkpoints: bool = False


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("reproduce", ReproduceConfig, arguments, positional="paper")
    console = Terminal()
    found = paper(options.paper)
    if options.rows == ["list"]:
        for row in found.rows.values():
            console.print(f"{row.name}: {row.title}")
        return 0
    rows = [found.row(name) for name in options.rows or found.rows]
    if "folds" in options_of_file(options):
        raise UserError(f"--options {options.options}: folds makes several runs of a row; leave it out")
    if options.protocol is not None:
        protocol(options.protocol)
    require(options.jobs >= 1, "jobs", "at least 1", options.jobs)
    out = Path(options.out or f"runs/{found.number}")
    with writing(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with StopSignal():
            return sweep(found, rows, out, options, console)
    except Stopped as stopped:
        console.print(f"stopped; the same command goes on with what {out} holds")
        return 128 + stopped.number


def options_of_file(options: ReproduceConfig) -> dict[str, Any]:
    """What the file of options holds; nothing of one that cannot be read, which a row reports."""
    with suppress(UserError):
        return read_yaml(Path(options.options)) if options.options is not None else {}
    return {}


def sweep(found: Paper, rows: Sequence[Row], out: Path, options: ReproduceConfig, console: Console) -> int:
    """Train every row with every seed, and write and show the table; 1 if a run failed."""
    file = Path(options.table) if options.table is not None else out / "table.json"
    with writing(file.parent, "choose another --table"):
        file.parent.mkdir(parents=True, exist_ok=True)
    recorded = read_table(file, found) if file.exists() else {}
    results = {name: recorded.get(name) or RowResult(row) for name, row in found.rows.items()}
    wanted = {f"{found.number}/{row.name}, seed {seed}": (row, seed) for row in rows for seed in options.seeds or [0]}
    shown = [result for result in results.values() if result.row in rows or result.row.name in recorded]

    def begin(run: PlannedRun) -> None:
        console.rule(f"{[*wanted].index(run.name) + 1} of {len(wanted)}: {run.name}", align="left")

    def end(run: PlannedRun, outcome: RunResult | UserError) -> None:
        result = results[run.directory.parent.name]
        if isinstance(outcome, UserError):
            console.print(f"{run.name}: {outcome}")
            result.failures[run.seed] = str(outcome)
        else:
            result.runs[run.seed] = outcome
            result.failures.pop(run.seed, None)
            if run.directory.exists():
                result.directories[run.seed] = Run(run.directory)
            else:
                console.print(f"{run.name}: {file} has its scores")
        with writing(file.parent, "free some space and run the same command again"):
            write_tables(out, found, shown, file)

    planned = []
    for name, (row, seed) in wanted.items():
        directory = out / row.name / f"seed-{seed}"
        given = [f"--recipe={found.number}/{row.name}", f"--seed={seed}", f"--out={directory}"]
        given += train_options(options, row)
        run = PlannedRun(name, directory, given, seed, results[row.name].runs.get(seed))
        missing = [need for need in row.needs if getattr(options, need) is None]
        if missing:
            end(run, UserError(f"needs a file: give --{missing[0]} FILE"))
        else:
            planned.append(run)
    finish_runs(planned, file, options.jobs, begin, end, delete_checkpoints=options.delete_checkpoints)
    console.print(terminal_table(found, shown))
    console.print(f"written: {out / 'table.md'}, {file} and {out / 'report.html'}")
    return int(any(seed in results[row.name].failures for row, seed in wanted.values()))


def train_options(options: ReproduceConfig, row: Row) -> list[str]:
    """The options of minbert train for a row: those of all rows, of the protocol, and the files that the row needs."""
    values = {name: getattr(options, name) for name in ("data", "model", "epochs", "steps")}
    values |= {"config": options.options, **{FILES[name]: getattr(options, name) for name in row.needs}}
    given = {name: value for name, value in values.items() if value is not None}
    if options.protocol is not None:
        of_file = options_of_file(options)
        of_protocol = protocol(options.protocol).options(row)
        given = {name: value for name, value in of_protocol.items() if name not in of_file} | given
    return [
        f"--{name.replace('_', '-')}={json.dumps(value) if isinstance(value, dict) else value}"
        for name, value in given.items()
    ]


if __name__ == "__main__":
    cli.run(main)
