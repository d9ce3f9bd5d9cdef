"""What the scripts share that train several runs, and write a table of them.

Each run is `minbert train` in a process of its own. A finished run is used again, and an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from records import RESULTS, machine, write_record

from minbert import cli
from minbert.config import TrainConfig
from minbert.errors import UserError, require
from minbert.files.atomic import writing
from minbert.report.run_result import RunResult
from minbert.runs.run_directory import Run
from minbert.training.recorded_runs import PlannedRun, finish_runs


class OneLineErrors(argparse.ArgumentParser):
    """Raises a UserError for a bad argument."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


class Parser(OneLineErrors):
    """The options of a script; those of minbert.train stand after --.

    Args:
        script: its file.
        runs: the default of --runs.
    """

    def __init__(self, script: str, description: str, runs: str) -> None:
        usage = f"python bench/{script} [--OPTION VALUE ...] [-- OPTIONS OF minbert.train]"
        super().__init__(usage=usage, description=description)
        self.add_argument("--data", help="as for minbert.train")
        self.add_argument("--model", help="likewise")
        self.add_argument("--seeds", type=listed(int), default="0,1,2", help="one run of each for each (%(default)s)")
        self.add_argument("--runs", type=Path, default=Path(runs), help="directory of the runs (%(default)s)")
        add_results(self)
        self.add_argument("options", nargs="*", help="further options of minbert.train, after --")

    def add_table(self) -> None:
        """The options of a script whose runs may be recorded in a file, and trained at once."""
        self.add_argument(
            "--table",
            type=Path,
            help="JSON file of what all runs came to, read and written: a run that it holds is not trained again where"
            " its directory is not there (table.json in --runs)",
        )
        self.add_argument(
            "--jobs",
            type=positive,
            default=1,
            help="runs that train at once, each with its share of the CPU threads (%(default)s)",
        )
        self.add_argument(
            "--delete-checkpoints", action="store_true", help="of each run that has finished, when the table has it"
        )


def add_results(parser: argparse.ArgumentParser) -> None:
    """The option --results."""
    text = "directory of the record, TIME.json and TIME.md (bench/results)"
    parser.add_argument("--results", type=Path, default=RESULTS, help=text)


def positive(text: str) -> int:
    """A type of argparse's: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def listed(kind: type) -> Callable[[str], list[Any]]:
    """A type of argparse's: values of `kind`, separated by commas."""

    def values(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part.strip()]

    values.__name__ = f"list of {kind.__name__}"  # for argparse's message
    return values


def command_line(options: argparse.Namespace, own: Mapping[str, object]) -> list[str]:
    """The arguments of minbert.train: those after --, --data, --model, and the run's own.

    Raises:
        UserError: an argument after -- that the script gives itself.
    """
    given = {name: getattr(options, name) for name in ("data", "model")}
    refuse_own(options.options, (*given, *own, "resume"), "after --")
    own = own | {name: value for name, value in given.items() if value is not None}
    return [*options.options, *(f"--{name}={value}" for name, value in own.items())]


def refuse_own(arguments: Iterable[str], own: Iterable[str], where: str) -> None:
    """Refuse options of minbert.train that a script gives itself, by name; `where` they stand ends their name."""
    ours = {f"--{name}" for name in own}
    for argument in arguments:
        if (name := argument.partition("=")[0]) in ours:
            raise UserError(f"{name} {where}: this script gives it to every run; --help lists its own options")


def name_and_options(system: str) -> list[str]:
    """The name of a system, `NAME --OPTION=VALUE ...`, and its options of minbert.train."""
    return re.split(r"\s+(?=--)", system)


def directories(systems: Sequence[str], option: str) -> dict[str, str]:
    """By system, the name of the directory of its runs.

    Args:
        option: which lists the systems.

    Raises:
        UserError: two have the same.
    """
    names = {system: re.sub(r"[^\w.=+]+", "-", system).strip("-") for system in systems}
    same = len(set(names.values())) < len(names)
    require(not same, option, "a list of which no two have one directory", ", ".join(names))
    return names


def check(command_lines: Iterable[Sequence[str]], options: argparse.Namespace) -> None:
    """Check every option before the first run, and make the directories of the runs and of the record.

    Raises:
        UserError: minbert.train refuses an option, or a directory cannot be made.
    """
    for arguments in command_lines:
        cli.parse_layers("train", TrainConfig, arguments)
    for name in ("runs", "results"):
        make(getattr(options, name), f"--{name}")


def make(directory: Path, option: str) -> None:
    """Make a directory that an option names.

    Raises:
        UserError: it cannot be made.
    """
    with writing(directory, f"choose another {option}"):
        directory.mkdir(parents=True, exist_ok=True)


def require_distinct(options: argparse.Namespace, *names: str) -> None:
    """Refuse an empty list and one with repetitions."""
    for name in names:
        given = getattr(options, name)
        require(len(given) == len(set(given)) > 0, name, "a list without repetitions", ",".join(map(str, given)))


def train(directory: Path, arguments: Sequence[str]) -> Run:
    """Train the run of a directory unless it has finished.

    Raises:
        UserError: minbert.train refuses the options or the data, or fails.
        Stopped: a signal came. The run has saved a checkpoint.
    """

    def end(run: PlannedRun, outcome: RunResult | UserError) -> None:
        if isinstance(outcome, UserError):
            raise outcome

    with training_errors():
        finish_runs([PlannedRun(str(directory), directory, arguments)], directory, 1, lambda run: None, end)
    return Run(directory)


@contextmanager
def training_errors() -> Iterator[None]:
    """Errors of minbert.train that advise another --out advise another --runs, which chooses it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--out", "--runs")) from None


def with_deviation(values: Sequence[float], digits: int = 4, sign: str = "") -> str:
    """The mean of values, and of several the deviation of the sample."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def chosen_by(run: Run) -> dict[str, object]:
    """This machine, and what a run chose on it."""
    config = run.config()
    made_on = machine() | {"matmul": config.matmul, "precision": config.precision}
    return made_on | ({"threads": config.threads} if config.threads is not None else {})


def command(script: str, arguments: Sequence[str]) -> str:
    """The command line as a record has it: FILE or DIR for where things lie on this machine."""
    shown, places = [], {"--data": "DIR", "--model": "DIR", "--runs": "DIR", "--results": "DIR"}
    places |= {"--table": "FILE", "--plot": "FILE"}
    for before, argument in zip(("", *arguments), arguments, strict=False):
        name, equals, _ = argument.partition("=")
        place = places.get(before) or (f"{name}={places[name]}" if equals and name in places else None)
        shown.append(place or shlex.quote(argument))
    return " ".join((f"python bench/{script}", *shown))


def write(
    title: str,
    command: str,
    rows: Sequence[Mapping[str, object]],
    table: str,
    made_on: Mapping[str, object],
    results: Path,
    **more: Any,
) -> None:
    """Write the record TIME.json and beside it the table, TIME.md; print where.

    Args:
        made_on: the machine, and what was chosen on it.
    """
    path = write_record(rows, made_on=made_on, results=results, **more)
    path.with_suffix(".md").write_text(f"# {title}\n\n`{command}`\n\n{table}", encoding="utf-8")
    print(f"written: {path} and {path.with_suffix('.md').name}")
