"""Train the rows of a paper's tables and print them beside the published figures: `python -m minbert.reproduce 000`.

Every row and seed is a run of `python -m minbert.train --recipe PAPER/ROW` in a process of its own. What is done is not
done again, what was interrupted goes on, what is to be longer is extended, and a row that fails leaves the others their
turn. A run in the same place with other options is never taken for the one that is asked for: it is named, and kept.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from minbert import cli
from minbert.config import TrainConfig
from minbert.console import Terminal
from minbert.errors import UserError, did_you_mean
from minbert.files.atomic import write_atomically, write_json, writing
from minbert.recipes import Paper, Row, paper
from minbert.report import comparison, write_comparison
from minbert.report.history import flat_scores
from minbert.runs.resume import LENGTH, differences
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS
from minbert.training.stop_signal import Stopped, StopSignal

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)  # exit codes
HOURS = "hours an epoch"
FILES = {"reviews": "reviews", "augmented": "augmented.sst"}  # what a row may need, as an option of minbert.train


@dataclass(frozen=True)
class ReproduceConfig:
    """Train the rows of a paper's tables and print them beside the published figures.

    Args:
        paper: the paper's number: 000 to 004.
        rows: rows to train, by their names; all when left out. `--rows list` prints the names.
        seeds: one run of each row for every seed; the table then has their mean and standard deviation.
        data: as for minbert.train.
        model: likewise.
        options: YAML file of further options of minbert.train, for all rows, over those of the recipes.
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


@dataclass(frozen=True)
class Outcome:
    """What became of the runs of a row."""

    row: Row
    runs: Sequence[Run]  # of the seeds that are done
    failures: Sequence[str]

    def found(self) -> dict[str, list[float]]:
        """Our scores by column, as `columns` names them: one for each seed."""
        found: dict[str, list[float]] = {}
        for summary in (run.summary() for run in self.runs):
            for split in ("dev", "test"):
                scores = flat_scores(summary.get(split, {}))
                if len(scores) > 1:
                    scores["overall"] = summary[split]["overall"]
                for name, score in scores.items():
                    found.setdefault(f"{split} {name}", []).append(score)
            found.setdefault(HOURS, []).append(
                summary["seconds"] / summary["steps"] * summary["steps_per_epoch"] / 3600
            )
        return found

    def published(self) -> dict[str, float]:
        """The paper's, likewise."""
        scores = {f"{split} {name}": score for split, by in self.row.published.items() for name, score in by.items()}
        return scores if self.row.hours is None else {**scores, HOURS: self.row.hours}


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("reproduce", ReproduceConfig, arguments, positional="paper")
    console = Terminal()
    found = paper(options.paper)
    if options.rows == ["list"]:
        for row in found.rows.values():
            console.print(f"{row.name}: {row.title}")
        return 0
    rows = chosen(found, options.rows)
    seeds, out = options.seeds or [0], Path(options.out or f"runs/{found.number}")
    with writing(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with StopSignal():
            return sweep(found, rows, seeds, out, options, console)
    except Stopped as stopped:
        console.print(f"stopped; the same command goes on with what {out} holds")
        return 128 + stopped.number


def sweep(found: Paper, rows: Sequence[Row], seeds: Sequence[int], out: Path, options: Any, console: Console) -> int:
    """Train every row with every seed, and write and show the table; 1 if a run failed."""
    shared = common_words(options)
    outcomes = [Outcome(row, [], []) for row in rows]
    for i, row in enumerate(rows):
        runs, failures = [], []
        for seed in seeds:
            number = i * len(seeds) + seeds.index(seed) + 1
            console.rule(f"{number} of {len(rows) * len(seeds)}: {found.number}/{row.name}, seed {seed}", align="left")
            directory = out / row.name / f"seed-{seed}"
            missing = [name for name in row.needs if getattr(options, name) is None]
            own = [f"--{FILES[name]}={getattr(options, name)}" for name in row.needs]
            if missing:
                problem: str | None = f"needs a file: give --{missing[0]} FILE"
            else:
                problem = train(f"{found.number}/{row.name}", seed, directory, [*shared, *own])
            if problem is None:
                runs.append(Run(directory))
            else:
                console.print(f"{found.number}/{row.name}, seed {seed}: {problem}")
                failures.append(f"seed {seed}: {problem}")
        outcomes[i] = Outcome(row, runs, failures)
        with writing(out, "free some space and run the same command again"):
            write_results(out, found, outcomes)
    console.print(table(found, outcomes))
    console.print(f"written to {out}: table.md, table.json and report.html")
    return int(any(outcome.failures for outcome in outcomes))


def chosen(found: Paper, names: Sequence[str] | None) -> list[Row]:
    """The rows of these names.

    Raises:
        UserError: the paper has no such row.
    """
    for name in names or ():
        if name not in found.rows:
            raise UserError(
                f"--rows: paper {found.number} has no row {name!r}{did_you_mean(name, list(found.rows))};"
                f" rows: {', '.join(found.rows)}"
            )
    return [found.rows[name] for name in names or found.rows]


def common_words(options: Any) -> list[str]:
    """Options of minbert.train that all rows share."""
    words = [f"--{name}={getattr(options, name)}" for name in ("data", "model", "epochs", "steps")]
    words = [word for word in words if not word.endswith("=None")]
    return [*words, f"--config={options.options}"] if options.options else words


def train(recipe: str, seed: int, directory: Path, options: Sequence[str]) -> str | None:
    """Have a run done that is not done yet.

    Returns:
        what went wrong, in one line; None if nothing did.

    Raises:
        Stopped: a signal came. The run has saved itself, and the same command goes on.
    """
    words = [f"--recipe={recipe}", f"--seed={seed}", f"--out={directory}", *options]
    if (directory / "summary.json").exists():
        try:
            changed = differences(Run(directory).config(), cli.parse_layers("train", TrainConfig, words))
        except UserError as error:
            return str(error)
        other = [change for name, change in changed.items() if name not in LENGTH]
        if other:
            return f"{directory} holds a run with other options: {', '.join(other)}; give another --out"
        if not changed:
            return None
    if (directory / "config.yaml").exists():
        words.append("--resume")
    run = subprocess.Popen([sys.executable, "-m", "minbert.train", *words], stderr=subprocess.PIPE, text=True)
    try:
        _, errors = run.communicate()
    except Stopped as stopped:
        if stopped.number != signal.SIGINT:  # of that the terminal has told it too
            run.send_signal(stopped.number)
        run.wait()
        raise
    if run.returncode in STOPPED:
        raise Stopped(signal.SIGINT)
    if run.returncode == 0:
        return None
    last = [line for line in errors.splitlines() if line.strip()][-1:] or [f"exit code {run.returncode}"]
    return last[0].removeprefix("error: ")


# The table --------------------------------------------------------------------------------------------------------


def columns(outcomes: Sequence[Outcome]) -> list[str]:
    """What is compared: dev scores, then test scores and hours where the paper has them."""
    present = {name for outcome in outcomes for name in (*outcome.published(), *outcome.found())}
    if not any(HOURS in outcome.published() for outcome in outcomes):
        present.discard(HOURS)
    order = [f"{split} {name}" for split in ("dev", "test") for name in (*TASKS, "overall")]
    return [name for name in (*order, HOURS) if name in present]


def cells(outcome: Outcome, names: Sequence[str]) -> list[str]:
    """Of each column the published figure and ours."""
    published, found = outcome.published(), outcome.found()
    pairs = [
        (f"{published[name]:.3f}" if name in published else "–", _mean(found[name]) if name in found else "–")
        for name in names
    ]
    return ["" if pair == ("–", "–") else " / ".join(pair) for pair in pairs]


def _mean(values: Sequence[float]) -> str:
    spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def table(found: Paper, outcomes: Sequence[Outcome]) -> Table:
    """Rows of the paper's table, each figure beside ours."""
    names = columns(outcomes)
    shown = Table(box=box.SIMPLE_HEAD, title=found.title, title_justify="left", title_style="bold")
    shown.add_column("published / ours", min_width=16)
    for name in names:
        shown.add_column(name)
    for outcome in outcomes:
        failed = f" ({len(outcome.failures)} failed)" if outcome.failures else ""
        shown.add_row(outcome.row.title + failed, *cells(outcome, names))
    return shown


def write_results(out: Path, found: Paper, outcomes: Sequence[Outcome]) -> None:
    """Write table.md and table.json: what is done so far."""
    names = columns(outcomes)
    lines = [f"| published / ours | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {' | '.join([outcome.row.title, *cells(outcome, names)])} |" for outcome in outcomes]
    failures = [f"- {outcome.row.title}: {failure}" for outcome in outcomes for failure in outcome.failures]
    text = "\n".join([f"# {found.title}", "", *lines, "", *failures]).rstrip() + "\n"
    write_atomically(out / "table.md", text)
    record = {
        outcome.row.name: {
            "title": outcome.row.title,
            "published": outcome.published(),
            "ours": outcome.found(),
            "failures": list(outcome.failures),
        }
        for outcome in outcomes
    }
    write_json(out / "table.json", record)
    rows = []
    for outcome in outcomes:
        runs: Sequence[Run | None] = outcome.runs or [None]
        published, note = _report_names(outcome.published()), "; ".join(outcome.failures)
        rows += [comparison.Row(outcome.row.title, published, run, note) for run in runs]
    write_comparison(out / "report.html", found.title, rows)


def _report_names(published: Mapping[str, float]) -> dict[str, float]:
    """Published figures as the report names them: dev scores by their task alone, test scores "sst test"."""
    return {
        name.removeprefix("dev ") if name.startswith("dev ") else " ".join(reversed(name.split(" ", 1))): score
        for name, score in published.items()
        if name != HOURS
    }


if __name__ == "__main__":
    cli.run(main)
