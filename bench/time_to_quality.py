"""Minutes of training to an overall dev score, by recipe: `python bench/time_to_quality.py --data DIR --model DIR`.

A run is scored at the ends of its epochs, and its learning rate falls to 0 at its own end: a score on the way is that
of a rate still high, and no run of that length. So every number of epochs is a schedule with runs of its own, one for
each seed, and the time to the target is that of the shortest schedule whose final score, averaged over the seeds, meets
it. Each run is `minbert train` in a process of its own. A finished run is used again; an interrupted one goes
on, and its minutes are then unknown.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training_runs import (
    Parser,
    check,
    chosen_by,
    command,
    command_line,
    listed,
    require_distinct,
    train,
    with_deviation,
    write,
)

from minbert import cli
from minbert.errors import UserError, require
from minbert.files.atomic import write_json, writing
from minbert.files.json_yaml import read_json
from minbert.runs.run_directory import Run
from minbert.training.stop_signal import StopSignal


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


def timed(directory: Path, seed: int, target: float, arguments: Sequence[str]) -> Outcome:
    """Train the run of a directory unless it has finished, and time it; errors as for `training_runs.train`."""
    clock = directory.with_suffix(".json")
    started, begun = time.time(), directory.exists()
    run = train(directory, arguments)
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
        final, best = (with_deviation([getattr(run, name) for run in schedule.runs]) for name in ("final", "best"))
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


# The command line -----------------------------------------------------------------------------------------------------


def parser() -> Parser:
    made = Parser("time_to_quality.py", (__doc__ or "").partition(":")[0], "runs/time-to-quality")
    made.add_argument(
        "--recipes", type=listed(str), default="plain,pcgrad,smart-pcgrad,gse", help="of minbert.train (%(default)s)"
    )
    made.add_argument(
        "--epochs",
        type=listed(int),
        default="1,2,3",
        help="schedules: the next longer one where one is too short (%(default)s)",
    )
    made.add_argument("--target", type=float, default=0.74, help="overall dev score (%(default)s)")
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    require_distinct(options, "recipes", "seeds", "epochs")
    require(0 < options.target < 1, "target", "between 0 and 1", options.target)

    def given(recipe: str, epochs: int, seed: int) -> tuple[Path, list[str]]:
        directory = options.runs / recipe / f"epochs-{epochs}" / f"seed-{seed}"
        own = {"recipe": recipe, "epochs": epochs, "seed": seed, "out": directory}
        return directory, command_line(options, own)

    def runs(recipe: str, epochs: int) -> Iterable[Outcome]:
        for seed in options.seeds:
            directory, arguments = given(recipe, epochs, seed)
            print(f"{recipe}, {epochs} epochs, seed {seed}", flush=True)
            yield timed(directory, seed, options.target, arguments)

    cases = itertools.product(options.recipes, options.epochs, options.seeds)
    check([given(*case)[1] for case in cases], options)
    with StopSignal():
        done = schedules(options.recipes, options.epochs, options.target, runs)
    text = table(done)
    print(text, end="")
    write(
        "Time to quality",
        command("time_to_quality.py", arguments),
        [schedule.row() for schedule in done],
        text,
        chosen_by(Run(given(done[-1].recipe, done[-1].epochs, options.seeds[0])[0])),
        options.results,
        target=options.target,
        options=options.options,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
