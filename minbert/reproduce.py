"""Train the rows of a paper's tables and print them beside the published figures: `minbert reproduce 000`.

Every row and seed is a run of `minbert train --recipe PAPER/ROW` in a separate process. The command skips
a finished run, resumes an interrupted one, extends one that is to be longer, and continues with the next row when one
fails. A run with other options in the same directory is an error, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from minbert import cli
from minbert.console import Terminal
from minbert.errors import UserError
from minbert.files.atomic import writing
from minbert.files.json_yaml import read_yaml
from minbert.recipes import Paper, Row, paper
from minbert.report.paper_table import RowResult, terminal_table, write_tables
from minbert.runs.run_directory import Run
from minbert.training.child_process import train_in_process
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
        options: YAML file of further options of minbert train, for all rows, over those of the recipes.
        epochs: in place of the paper's.
        steps: likewise, whatever the epochs.
        reviews: file of reviews with stars, for the rows with an auxiliary task (001).
        augmented: file of further sst examples, for the rows with augmented data (002).
        out: directory of the runs; runs/PAPER when left out.
    """

    paper: str
    rows: list[str] | None = None
    seeds: list[int] | None = None
    data: str | None = None
    model: str | None = None
    options: str | None = None
    epochs: int | None = None
    steps: int | None = None
    reviews: str | None = None
    augmented: str | None = None
    out: str | None = None


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("reproduce", ReproduceConfig, arguments, positional="paper")
    console = Terminal()
    found = paper(options.paper)
    if options.rows == ["list"]:
        for row in found.rows.values():
            console.print(f"{row.name}: {row.title}")
        return 0
    rows = [found.row(name) for name in options.rows or found.rows]
    if options.options is not None and names_folds(Path(options.options)):
        raise UserError(f"--options {options.options}: folds makes several runs of a row; leave it out")
    out = Path(options.out or f"runs/{found.number}")
    with writing(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with StopSignal():
            return sweep(found, rows, out, options, console)
    except Stopped as stopped:
        console.print(f"stopped; the same command goes on with what {out} holds")
        return 128 + stopped.number


def names_folds(options: Path) -> bool:
    """Whether a file of options asks for cross-validation; not of a file that cannot be read, which a row reports."""
    with suppress(UserError):
        return read_yaml(options).get("folds") is not None
    return False


def sweep(found: Paper, rows: Sequence[Row], out: Path, options: ReproduceConfig, console: Console) -> int:
    """Train every row with every seed, and write and show the table; 1 if a run failed."""
    results = [RowResult(row) for row in rows]
    runs = [(result, seed) for result in results for seed in options.seeds or [0]]
    for number, (result, seed) in enumerate(runs, 1):
        recipe = f"{found.number}/{result.row.name}"
        console.rule(f"{number} of {len(runs)}: {recipe}, seed {seed}", align="left")
        directory = out / result.row.name / f"seed-{seed}"
        missing = [name for name in result.row.needs if getattr(options, name) is None]
        if missing:
            problem: str | None = f"needs a file: give --{missing[0]} FILE"
        else:
            given = [f"--recipe={recipe}", f"--seed={seed}", f"--out={directory}"]
            problem = train_in_process(directory, [*given, *train_options(options, result.row)])
        if problem is None:
            result.runs.append(Run(directory))
        else:
            console.print(f"{recipe}, seed {seed}: {problem}")
            result.failures.append(f"seed {seed}: {problem}")
        with writing(out, "free some space and run the same command again"):
            write_tables(out, found, results)
    console.print(terminal_table(found, results))
    console.print(f"written to {out}: table.md, table.json and report.html")
    return int(any(result.failures for result in results))


def train_options(options: ReproduceConfig, row: Row) -> list[str]:
    """The options of minbert train that are the same for all rows, and the files that this one needs."""
    values = {name: getattr(options, name) for name in ("data", "model", "epochs", "steps")}
    values |= {"config": options.options, **{FILES[name]: getattr(options, name) for name in row.needs}}
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


if __name__ == "__main__":
    cli.run(main)
