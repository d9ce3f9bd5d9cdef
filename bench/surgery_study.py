"""Dev scores, seconds and conflicts by surgery: `python bench/surgery_study.py --data DIR --model DIR --runs DIR`.

Trains a run for each surgery and seed, `--jobs` at once, and writes a table with a row for each surgery; `--plot
FILE.png` draws it. Runs of one seed have the same data order and the same new weights whatever the surgery, so the
difference from the first surgery is taken seed by seed. A finished run is used again, and an interrupted one goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import scores_of_runs
from figures import picture, save
from scores_of_runs import Row, footnote, made_on, trained
from training_runs import (
    Parser,
    check,
    command,
    command_line,
    directories,
    make,
    name_and_options,
    require_distinct,
    write,
)

from minbert import cli
from minbert.methods.surgery import NAMES
from minbert.methods.weightings import WEIGHTINGS
from minbert.training.stop_signal import StopSignal

OWN_OPTIONS = {"dwa": "dwa(every=20)"}  # with its default it is sum in an epoch of fewer than 200 steps
NAMED = (*NAMES, *(name for name in WEIGHTINGS if name != "constant"))  # which has no weights of its own
SURGERIES = tuple(OWN_OPTIONS.get(name, name) for name in NAMED)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the surgeries' scores, seconds and conflicts."""
    further: dict[str, Callable[[Row], str]] = {
        "seconds": lambda row: f"{row.seconds:.0f}",
        "conflicts": lambda row: row.mean("conflict_rate"),
        "projected": lambda row: row.mean("projected_share"),
    }
    seeds = len(rows[0].runs)
    end = f"Of {seeds} seed{'s' if seeds > 1 else ''}, {rows[0].runs[0].steps} steps each."
    return "\n".join([*scores_of_runs.table("surgery", rows, further), "", end, "", footnote(rows)])


def draw(path: Path, rows: Sequence[Row]) -> None:
    """The overall scores of each surgery, a mark for each seed and a bar at their mean, from the best mean down.

    A line shows the first surgery's mean.
    """
    from matplotlib.figure import Figure

    ranked = sorted(rows, key=lambda row: statistics.mean(row.overall), reverse=True)
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(statistics.mean(rows[0].overall), color="0.7", linewidth=1)
    for number, run in enumerate(rows[0].runs):
        scores = [row.overall[number] for row in ranked]
        axes.plot(scores, range(len(ranked)), "os^Dv"[number % 5], markersize=5, alpha=0.8, label=f"seed {run.seed}")
    axes.plot([statistics.mean(row.overall) for row in ranked], range(len(ranked)), "|", color="black", markersize=14)
    axes.set_yticks(range(len(ranked)), [row.name for row in ranked])
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.set_xlabel("overall score on dev (bar: mean of the seeds)")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(figure, path)


def main(arguments: Sequence[str]) -> int:
    made = Parser("surgery_study.py", (__doc__ or "").partition(":")[0], "runs/surgery-study")
    made.add_argument(
        "--surgeries",
        nargs="+",
        default=["all"],
        help="names for --surgery, each perhaps with further options: sum 'cagrad(c=0.5)' 'pcgrad --surgery-groups=..';"
        " the others' scores are compared with the first one's; all stands for all that minbert has, from sum on (all)",
    )
    made.add_argument("--epochs", type=int, default=1, help="of each run (%(default)s)")
    made.add_argument("--plot", type=picture, help="a .png or .svg file to draw the scores to")
    made.add_table()
    options = made.parse_args(arguments)
    named = [SURGERIES if surgery == "all" else (surgery,) for surgery in options.surgeries]
    options.surgeries = [surgery for names in named for surgery in names]
    require_distinct(options, "surgeries", "seeds")
    places = directories(options.surgeries, "surgeries")

    def given(surgery: str, seed: int) -> tuple[Path, list[str]]:
        directory = options.runs / places[surgery] / f"seed-{seed}"
        name, *further = name_and_options(surgery)
        own = {"surgery": name, "epochs": options.epochs, "seed": seed, "out": directory}
        return directory, [*command_line(options, own), *further]

    check([given(surgery, seed)[1] for surgery in options.surgeries for seed in options.seeds], options)
    if options.plot is not None:
        make(options.plot.parent, "--plot")
    with StopSignal():
        rows = trained(options.surgeries, options, given)
    text = table(rows)
    print(text, end="")
    if options.plot is not None:
        draw(options.plot, rows)
    write(
        "Dev scores by surgery",
        command("surgery_study.py", arguments),
        [{"benchmark": "surgery_study", "case": "dev scores", **row.record(rows[0])} for row in rows],
        text,
        made_on(rows),
        options.results,
        options=options.options,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
