"""Minutes of training to an overall dev score, by recipe: `python bench/time_to_quality.py --data DIR --model DIR`.

A run is scored at the ends of its epochs, and its learning rate falls to 0 at its own end: a score on the way is that
of a rate still high, and no run of that length. So every number of epochs is a schedule with runs of its own, one for
each seed, and the time to the target is that of the shortest schedule whose final score, averaged over the seeds, meets
it. Each run is `minbert train` in a process of its own. A finished run is used again; an interrupted one goes
on, and its minutes are then unknown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from records import RESULTS, machine, write_record

from minbert import cli
from minbert.config import TrainConfig
from minbert.errors import UserError, require
from minbert.files.atomic import write_json, writing
from minbert.files.json_yaml import read_json
from minbert.runs.run_directory import Run
from minbert.training.child_process import train_in_process
from minbert.training.stop_signal import StopSignal

OWN = ("--recipe", "--seed", "--epochs", "--out", "--data", "--model", "--resume")  # of minbert.train, given here


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    seed: int
    steps: int
    final: float  # overall dev score after the last epoch
    best: float  # and after the best one
    met_at: int | None  # step at whose score the target was first met
    step_seconds: float  # median
    training_minutes: float  # of its steps alone
    minutes: float | None  # from the start of the command to the last dev score; None where the run was interrupted


@dataclass(frozen=True)
class Schedule:
    """The runs of a recipe with one number of epochs."""

    recipe: str
    epochs: int
    target: float
    runs: Sequence[Outcome]

    @property
    def name(self) -> str:
        return f"{self.recipe}, {self.epochs} epoch{'' if self.epochs == 1 else 's'}"

    @property
    def meets(self) -> bool:
        """Whether the final score, averaged over the seeds, meets the target."""
        return statistics.mean(run.final for run in self.runs) >= self.target

    @property
    def minutes(self) -> float | None:
        """Median over the runs whose minutes are known."""
        known = [run.minutes for run in self.runs if run.minutes is not None]
        return statistics.median(known) if known else None

    def row(self) -> dict[str, object]:
        """The row of a record. Deviations are those of the sample; None for a single seed."""
        final, best = [run.final for run in self.runs], [run.best for run in self.runs]
        several = len(self.runs) > 1
        return {
            "benchmark": "time_to_quality",
            "case": f"overall dev score of {self.target:g}",
            "name": self.name,
            "seconds": None if self.minutes is None else 60 * self.minutes,
            "meets": self.meets,
            "final": statistics.mean(final),
            "final_deviation": statistics.stdev(final) if several else None,
            "best": statistics.mean(best),
            "best_deviation": statistics.stdev(best) if several else None,
            "step_seconds": statistics.median(run.step_seconds for run in self.runs),
            "training_seconds": 60 * statistics.median(run.training_minutes for run in self.runs),
            "runs": [asdict(run) for run in self.runs],
        }


def outcome(run: Run, seed: int, target: float, minutes: float | None) -> Outcome:
    """What a finished run came to, from its metrics.jsonl and summary.json.

    Raises:
        UserError: a line is damaged, or the data has no dev split.
    """
    records, summary = run.metrics.records(), run.summary()
    scores = [(record["step"], record["dev"]["overall"]) for record in records if "dev" in record]
    if not scores:
        raise UserError(f"{run.path} has no dev scores: the data needs a dev split")
    return Outcome(
        seed=seed,
        steps=summary["steps"],
        final=scores[-1][1],
        best=max(score for _, score in scores),
        met_at=next((step for step, score in scores if score >= target), None),
        step_seconds=statistics.median(sum(record["seconds"].values()) for record in records if "seconds" in record),
        training_minutes=summary["seconds"] / 60,
        minutes=minutes,
    )


def train(directory: Path, seed: int, target: float, arguments: Sequence[str]) -> Outcome:
    """Train the run of a directory unless it has finished, and time it.

    Raises:
        UserError: minbert.train refuses the options or the data, or fails.
    """
    clock = directory.with_suffix(".json")
    started, begun = time.time(), directory.exists()
    if problem := train_in_process(directory, arguments):
        raise UserError(problem.replace("--out", "--runs"))  # which chooses --out
    run = Run(directory)
    if not begun:  # the last line of metrics.jsonl is that of the last dev score
        minutes = (run.metrics.path.stat().st_mtime - started) / 60
        with writing(clock, "free some space"):
            write_json(clock, {"minutes": minutes})
    return outcome(run, seed, target, read_json(clock)["minutes"] if clock.exists() else None)


def schedules(
    recipes: Sequence[str], epochs: Sequence[int], target: float, runs: Callable[[str, int], Iterable[Outcome]]
) -> list[Schedule]:
    """Each recipe's schedules from the shortest, up to the one that meets the target; `runs` trains one."""
    done = []
    for recipe in recipes:
        for length in sorted(epochs):
            done.append(Schedule(recipe, length, target, list(runs(recipe, length))))
            if done[-1].meets:
                break
    return done


# What is written ------------------------------------------------------------------------------------------------------


def table(done: Sequence[Schedule]) -> str:
    """A Markdown table of the schedules, and for each recipe the shortest one that meets the target."""
    lines = [
        "| recipe, schedule | steps | final dev | best dev | met at step, by seed | s a step | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for schedule in done:
        row, first = schedule.row(), schedule.runs[0]
        met = ", ".join("-" if run.met_at is None else str(run.met_at) for run in schedule.runs)
        minutes = "-" if schedule.minutes is None else f"{schedule.minutes:.1f}"
        final, best = (_with_deviation(row[name], row[f"{name}_deviation"]) for name in ("final", "best"))
        lines.append(
            f"| {schedule.name} | {first.steps} | {final} | {best} | {met} | {row['step_seconds']:.3f} | {minutes} |"
        )
    lines.append("")
    for recipe in dict.fromkeys(schedule.recipe for schedule in done):
        last = [schedule for schedule in done if schedule.recipe == recipe][-1]
        seeds = len(last.runs)
        over = "with one seed" if seeds == 1 else f"in the mean of {seeds} seeds"
        meets = f"is the shortest schedule that meets {last.target:g} {over}"
        lines.append(f"- {last.name} {meets if last.meets else f'does not meet {last.target:g} {over}'}.")
    return "\n".join(lines) + "\n"


def _with_deviation(mean: Any, deviation: Any) -> str:
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


# The command line -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def listed(kind: type) -> Callable[[str], list[Any]]:
    def values(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part.strip()]

    values.__name__ = f"list of {kind.__name__}"  # for argparse's message
    return values


def parser() -> Parser:
    made = Parser(
        usage="python bench/time_to_quality.py [--OPTION VALUE ...] [-- OPTIONS OF minbert.train]",
        description=(__doc__ or "").partition(":")[0],
    )
    made.add_argument("--data", help="as for minbert.train")
    made.add_argument("--model", help="likewise")
    made.add_argument(
        "--recipes", type=listed(str), default="plain,pcgrad,smart-pcgrad,gse", help="of minbert.train (%(default)s)"
    )
    made.add_argument(
        "--seeds", type=listed(int), default="0,1,2", help="one run of every schedule for each (%(default)s)"
    )
    made.add_argument(
        "--epochs",
        type=listed(int),
        default="1,2,3",
        help="schedules: the next longer one where one is too short (%(default)s)",
    )
    made.add_argument("--target", type=float, default=0.74, help="overall dev score (%(default)s)")
    made.add_argument(
        "--runs", type=Path, default=Path("runs/time-to-quality"), help="directory of the runs (%(default)s)"
    )
    made.add_argument(
        "--results", type=Path, default=RESULTS, help="directory of the record, TIME.json and TIME.md (bench/results)"
    )
    made.add_argument("options", nargs="*", help="further options of minbert.train, after --")
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    for name in ("recipes", "seeds", "epochs"):
        given = getattr(options, name)
        require(len(given) == len(set(given)) > 0, name, "a list without repetitions", ",".join(map(str, given)))
    require(0 < options.target < 1, "target", "between 0 and 1", options.target)
    for argument in options.options:
        if (name := argument.partition("=")[0]) in OWN:
            raise UserError(f"{name} after --: this script gives it to every run; --help lists its own options")

    def given(recipe: str, epochs: int, seed: int) -> tuple[Path, list[str]]:
        directory = options.runs / recipe / f"epochs-{epochs}" / f"seed-{seed}"
        own = {"recipe": recipe, "epochs": epochs, "seed": seed, "out": directory}
        own |= {name: getattr(options, name) for name in ("data", "model") if getattr(options, name) is not None}
        return directory, [*options.options, *(f"--{name}={value}" for name, value in own.items())]

    def runs(recipe: str, epochs: int) -> Iterable[Outcome]:
        for seed in options.seeds:
            directory, arguments = given(recipe, epochs, seed)
            print(f"{recipe}, {epochs} epochs, seed {seed}", flush=True)
            yield train(directory, seed, options.target, arguments)

    for recipe in options.recipes:  # every option is checked before the first run
        for epochs in options.epochs:
            for seed in options.seeds:
                cli.parse_layers("train", TrainConfig, given(recipe, epochs, seed)[1])
    with writing(options.runs, "choose another --runs"):
        options.runs.mkdir(parents=True, exist_ok=True)
    with StopSignal():
        done = schedules(options.recipes, options.epochs, options.target, runs)
    text = table(done)
    print(text, end="")
    path = write_record(
        [schedule.row() for schedule in done],
        made_on=_machine_of(Run(given(done[-1].recipe, done[-1].epochs, options.seeds[0])[0])),
        results=options.results,
        target=options.target,
        options=options.options,
    )
    command = " ".join(["python bench/time_to_quality.py", *arguments])
    path.with_suffix(".md").write_text(f"# Time to quality\n\n`{command}`\n\n{text}", encoding="utf-8")
    print(f"written: {path} and {path.with_suffix('.md').name}")
    return 0


def _machine_of(run: Run) -> dict[str, object]:
    """This machine with what a run chose on it."""
    config = run.config()
    made_on = machine() | {"matmul": config.matmul, "precision": config.precision}
    return made_on | ({"threads": config.threads} if config.threads is not None else {})


if __name__ == "__main__":
    cli.run(main)
