"""Dev scores by recipe, at equal epochs and at equal time: `python bench/recipe_study.py --data DIR --model DIR`.

Trains a run for each recipe and seed with as many epochs, `--jobs` at once, and writes a table of them. Then each
recipe trains runs of as many steps as take the time of the first recipe's, by the median of its own steps (the least
over the seeds), and a second table has these. They are runs of their own: a run's learning rate falls to 0 at its end.
The time is that of the steps alone, and runs of equal epochs that take it within 15 % stand in both tables. Runs of one
seed have the same new weights whatever the recipe, so the difference from the first recipe is taken seed by seed. A
finished run is used again, and an interrupted one goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import scores_of_runs
from scores_of_runs import Row, footnote, made_on, trained
from training_runs import (
    Parser,
    check,
    command,
    command_line,
    directories,
    name_and_options,
    refuse_own,
    require_distinct,
    write,
)

from minbert import cli
from minbert.errors import require
from minbert.training.stop_signal import StopSignal

RECIPES = ("plain", "pcgrad", "smart", "smart-pcgrad", "gse", "smart-gse")
SAME_TIME = 0.15  # share by which the time of a run may differ from the budget: that of equal work varies by 0.11


def equal_time_steps(rows: Sequence[Row], budget: float) -> dict[str, int]:
    """By recipe, the steps that take `budget` seconds; left out are recipes whose runs in `rows` take that, nearly."""
    others = [row for row in rows if abs(row.seconds / budget - 1) > SAME_TIME]
    return {row.name: max(1, round(budget / row.step_seconds)) for row in others}


def table(title: str, rows: Sequence[Row]) -> str:
    """A Markdown table of the recipes' scores, steps and seconds, under its title."""
    further: dict[str, Callable[[Row], str]] = {
        "steps": lambda row: str(row.runs[0].steps),
        "minutes": lambda row: f"{row.seconds / 60:.1f}",
    }
    return "\n".join([title, "", *scores_of_runs.table("recipe", rows, further, digits=3)]) + "\n"


def tables(epochs: int, same_epochs: Sequence[Row], same_time: Sequence[Row], budget: float) -> str:
    """Both tables, and where their runs were made.

    Args:
        same_time: none leaves the second table out.
        budget: seconds of the steps of `same_time`.
    """
    count = len(same_epochs[0].runs)
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    text = table(f"Equal epochs: {epochs} epoch{'s' if epochs > 1 else ''}, {seeds}.", same_epochs)
    if same_time:
        text += "\n" + table(f"Equal time: {budget / 60:.1f} minutes of steps, {seeds}.", same_time)
    return text + "\n" + footnote([*same_epochs, *same_time])


def record(case: str, row: Row, first: Row) -> dict[str, object]:
    """The row of a record."""
    own = {"step_seconds": row.step_seconds, "steps": row.runs[0].steps}
    return {"benchmark": "recipe_study", "case": case, **row.record(first), **own}


def parser() -> Parser:
    made = Parser("recipe_study.py", (__doc__ or "").partition(":")[0], "runs/recipe-study")
    made.add_argument(
        "--recipes",
        nargs="+",
        default=list(RECIPES),
        help="names for --recipe, each perhaps with further options: plain 'plain --surgery=config'; the others' scores"
        f" are compared with the first one's ({' '.join(RECIPES)})",
    )
    made.add_argument("--epochs", type=int, default=1, help="of the runs of equal epochs (%(default)s)")
    made.add_argument(
        "--minutes",
        type=float,
        help="of the steps of the runs of equal time (those of the first recipe's epochs); 0: no such runs",
    )
    made.add_table()
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    require_distinct(options, "recipes", "seeds")
    require(options.minutes is None or 0 <= options.minutes < float("inf"), "minutes", "at least 0", options.minutes)
    places = directories(options.recipes, "recipes")
    for recipe in options.recipes:
        refuse_own(
            name_and_options(recipe)[1:], ("recipe", "epochs", "steps", "seed", "out", "resume"), f"in {recipe!r}"
        )
    refuse_own(options.options, ["steps"], "after --")

    def given(recipe: str, seed: int, steps: Mapping[str, int]) -> tuple[Path, list[str]]:
        """Directory and arguments of a run of so many steps, or of the epochs for a recipe that is left out."""
        name, *further = name_and_options(recipe)
        length = {"steps": steps[recipe]} if recipe in steps else {"epochs": options.epochs}
        directory = options.runs / places[recipe] / "-".join(map(str, *length.items())) / f"seed-{seed}"
        own = {"recipe": name, **length, "seed": seed, "out": directory}
        return directory, [*command_line(options, own), *further]

    def runs(steps: Mapping[str, int]) -> list[Row]:
        return trained(options.recipes, options, lambda recipe, seed: given(recipe, seed, steps))

    check([given(recipe, seed, {})[1] for recipe in options.recipes for seed in options.seeds], options)
    with StopSignal():
        same_epochs = runs({})
        budget = same_epochs[0].seconds if options.minutes is None else 60 * options.minutes
        same_time = runs(equal_time_steps(same_epochs, budget)) if budget else []
    text = tables(options.epochs, same_epochs, same_time, budget)
    print(text, end="")
    cases = {"equal epochs": same_epochs, "equal time": same_time}
    write(
        "Dev scores by recipe",
        command("recipe_study.py", arguments),
        [record(case, row, rows[0]) for case, rows in cases.items() for row in rows],
        text,
        made_on([*same_epochs, *same_time]),
        options.results,
        epochs=options.epochs,
        budget_seconds=budget,
        options=options.options,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
