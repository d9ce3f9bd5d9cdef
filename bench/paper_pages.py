"""Pages and figures of the papers' tables: `python bench/paper_pages.py [--tables docs/papers] [--out docs/papers]`.

Reads every NNN.json of --tables, the table.json of `minbert reproduce NNN`, and writes to --out
- NNN.md and NNN.png: the table with machine, minutes and memory, and what each row gains over the row that its paper
  compares it with, published and ours;
- across.md and across.png: the rows of all papers by what they gain and the minutes that they take.

--check writes nothing: the exit code is 1, after one line, where a page is not what its table gives or a figure is not
there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from training_runs import OneLineErrors, with_deviation

from minbert import cli
from minbert.errors import UserError, one_line
from minbert.files.atomic import write_atomically, writing
from minbert.recipes import Paper, paper
from minbert.report.paper_table import RowResult, columns, read_table
from minbert.report.run_result import RunResult
from minbert.tasks import TASKS
from minbert.tasks.metrics import overall

PAGES = Path(__file__).parents[1] / "docs" / "papers"
COMPARED_TASKS = ("sst", "qqp", "sts")
# By paper: rows, of which the first pattern that fits counts, and the row that the paper compares them with.
COMPARED_WITH: Mapping[str, Mapping[str, str]] = {
    "000": {"*": "finetune"},
    # Sections 5.4.2 and 6.2 compare at the same dropout; the two rows of section 5.5 have 0.3.
    "001": {"finetune-mix-0.5": "finetune-mix-0.3", "*-0.5": "finetune-mix-0.5", "*": "finetune-mix-0.3"},
    # Section 7 measures E against A ("refer to A"); the legend and section 5.4 have F, G and H as changes of E.
    "002": {
        "[fgh]-finetune": "e-finetune",
        "[fgh]-pretrain": "e-pretrain",
        "*-finetune": "a-finetune",
        "*-pretrain": "a-pretrain",
    },
    # Section 4.4: shuffled for sequential batches, SMART on or off, and two changes of row 3. Row 4 has no SMART.
    "003": {"1": "2", "[56]": "3", "*": "4"},
    # Section 5.3: extension 2 is built on GSE, mean pooling on its best row, extension 4 on the rows that it prolongs.
    "004": {
        "cosine-2d1-*": "cosine-2d1",
        "smart-3x": "smart",
        "smart-gse": "gse",
        "gse-3x": "gse",
        "cosine-*": "gse",
        "surgery": "multitask",
        "gse": "multitask",
        "*": "baseline",
    },
}
PUBLISHED, OURS = "#c45a00", "tab:blue"


# Tables -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A row beside the one that its paper compares it with: differences of their overall scores on dev."""

    paper: Paper
    row: RowResult
    base: RowResult
    published: float | None
    pairs: Sequence[
        tuple[RunResult, RunResult, float]
    ]  # of each seed that both rows have: its run, the other's, and what it gains

    @property
    def recipe(self) -> str:
        return f"{self.paper.number}/{self.row.row.name}"

    @property
    def gains(self) -> list[float]:
        """Ours, by seed."""
        return [gain for *_, gain in self.pairs]

    @property
    def minutes(self) -> list[float]:
        """Of the row's runs, by seed."""
        return [minutes(run) for run, *_ in self.pairs]

    @property
    def minutes_more(self) -> list[float] | None:
        """By seed; None where a pair ran on two machines."""
        if any(run.machine != base.machine for run, base, _ in self.pairs):
            return None
        return [minutes(run) - minutes(base) for run, base, _ in self.pairs]


@dataclass(frozen=True)
class Table:
    """A paper and the rows of its table.json."""

    paper: Paper
    rows: Mapping[str, RowResult]

    def compared(self) -> list[Comparison]:
        """The rows that have an overall score, published or ours, and so has the row that they are compared with."""
        found = []
        for name, row in self.rows.items():
            base = self.rows.get(compared_with(self.paper.number, name), row)
            if base is row:
                continue
            others = base.counted
            pairs = [
                (run, others[run.seed], gain)
                for run in row.counted.values()
                if run.seed in others and (gain := difference(run.scores, others[run.seed].scores)) is not None
            ]
            published = difference(row.published(), base.published())
            if published is not None or pairs:
                found.append(Comparison(self.paper, row, base, published, pairs))
        return found


def compared_with(number: str, row: str) -> str:
    """The row that a paper compares a row with; that row itself where it is compared with none."""
    return next(base for pattern, base in COMPARED_WITH[number].items() if fnmatch(row, pattern))


def difference(scores: Mapping[str, float], others: Mapping[str, float]) -> float | None:
    """Of the overall scores; None where one has none."""
    first, second = overall_of(scores), overall_of(others)
    return None if first is None or second is None else first - second


def overall_of(scores: Mapping[str, float]) -> float | None:
    """The overall score on dev as a run has it, from those of sst, qqp and sts; None where one is missing.

    Not the paper's own: 001 takes the mean of the three as they are.
    """
    of_tasks = {name: {TASKS[name].metric: scores[f"dev {name}"]} for name in COMPARED_TASKS if f"dev {name}" in scores}
    return overall(of_tasks, TASKS.values()) if len(of_tasks) == len(COMPARED_TASKS) else None


def read_tables(directory: Path) -> list[Table]:
    """The tables of a directory.

    Raises:
        UserError: there is none, one is damaged, or there is no paper or row of a name.
    """
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise UserError(f"no tables in {directory}: copy the table.json of `minbert reproduce 000` there as 000.json")
    return [Table(found, read_table(path, found)) for path in paths for found in [paper(path.stem)]]


def minutes(run: RunResult) -> float:
    """Of all steps, from the median one: what ran beside some of them does not count."""
    return run.steps * run.step_seconds / 60


# Pages --------------------------------------------------------------------------------------------------------------


def written_by(sources: str) -> str:
    return f"<!-- `python bench/paper_pages.py` wrote this page from {sources}: change neither by hand. -->"


def paper_page(table: Table) -> str:
    """The page of a paper."""
    number, rows = table.paper.number, table.rows.values()
    runs = [run for row in rows for run in row.counted.values()]
    lines = [written_by(f"{number}.json"), "", f"# {number}: {table.paper.title}", "", *protocol(runs), ""]
    names = columns([*rows])
    lines += markdown_row(["published / ours", *names, "minutes", "peak memory"], heading=True)
    for row in rows:
        counted = row.counted.values()
        took = with_deviation([minutes(run) for run in counted], digits=1) if counted else ""
        peaks = [run.peak_memory_bytes for run in counted if run.peak_memory_bytes is not None]
        memory = f"{max(peaks) / 2**30:.1f} GiB" if peaks else ""
        lines += markdown_row(
            [f"{row.row.title} (`{row.row.name}`)", *(cell(row, name) for name in names), took, memory]
        )
    lines += ["", "± is the deviation of the sample over the seeds; minutes are those of the training steps alone."]
    if table.compared():
        lines += ["", f"![What the rows gain, published and ours]({number}.png)", "", ABOUT_OVERALL]
    failures = [f"- `{row.row.name}`, {one_line(line)}" for row in rows for line in row.lines]
    lines += ["", "Failed:", "", *failures] if failures else []
    run_or_failed = {name for name, row in table.rows.items() if row.runs or row.failures}
    missing = [f"`{name}`" for name in table.paper.rows if name not in run_or_failed]
    lines += ["", f"Not run: {', '.join(missing)}."] if missing else []
    return "\n".join(lines) + "\n"


ABOUT_OVERALL = (
    "The figure has differences of the overall scores on dev, (sst + qqp + (sts + 1) / 2) / 3. Published ones are"
    " computed from the published scores of the tasks, too: 001's own column is the mean of the three as they are. Rows"
    " without scores of all three tasks are not in it."
)


def protocol(runs: Sequence[RunResult]) -> list[str]:
    """What the runs were: their number, length, machines, commits, and the options that all of them have."""
    if not runs:
        return ["No run yet."]
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    commits = ", ".join(sorted({run.commit or "unknown" for run in runs}))
    common = set.intersection(*({(name, json.dumps(value)) for name, value in run.options.items()} for run in runs))
    lines = [
        f"Runs: {len(runs)} of seeds {seeds}, each of {span(run.steps for run in runs)} steps and"
        f" {span(run.examples for run in runs)} examples. Commit: {commits}.",
        "",
        machines(runs),
    ]
    if common:
        lines += ["", f"Options of all runs: {', '.join(f'`{name}: {value}`' for name, value in sorted(common))}."]
    return lines


def machines(runs: Sequence[RunResult]) -> str:
    """The machines of the runs, each with precision and the number of runs."""
    counts = Counter(run.machine for run in runs)
    return f"Machine: {'; '.join(f'{name} ({count} of {len(runs)} runs)' for name, count in sorted(counts.items()))}."


def span(values: Iterable[int]) -> str:
    """The least and the largest of values, or the only one."""
    found = sorted({*values})
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def cell(row: RowResult, name: str) -> str:
    """The published score and ours of a column."""
    theirs, ours = row.published().get(name), row.found().get(name)
    if theirs is None and not ours:
        return ""
    return f"{'–' if theirs is None else f'{theirs:.3f}'} / {with_deviation(ours, digits=3) if ours else '–'}"


def markdown_row(cells: Sequence[str], heading: bool = False) -> list[str]:
    """The line of a row, and the one below a heading."""
    return [f"| {' | '.join(cells)} |", *(["|---" * len(cells) + "|"] if heading else [])]


def across_page(compared: Sequence[Comparison]) -> str:
    """The page across papers: the rows that ran, from the largest gain on."""
    lines = [
        written_by("the tables here"),
        "",
        "# Across the papers",
        "",
        "What each row gains in the overall score on dev over the row that its paper compares it with, and that gain"
        " for each minute of training that it takes more.",
        "",
    ]
    if not compared:
        return "\n".join([*lines, "No run yet."]) + "\n"
    lines += [machines([run for each in compared for run, *_ in each.pairs]), ""]
    heading = ("row", "title", "less", "published", "ours", "minutes", "minutes more", "gain a minute more")
    lines += markdown_row(heading, heading=True)
    for each in sorted(compared, key=lambda each: statistics.mean(each.gains), reverse=True):
        lines += markdown_row(
            [
                f"[`{each.recipe}`]({each.paper.number}.md)",
                each.row.row.title,
                f"`{each.base.row.name}`",
                "–" if each.published is None else f"{each.published:+.3f}",
                with_deviation(each.gains, digits=3, sign="+"),
                with_deviation(each.minutes, digits=1),
                *minutes_cells(each),
            ]
        )
    lines += [
        "",
        "Differences are taken seed by seed; ± is the deviation of the sample over the seeds. Minutes are those of the"
        " training steps alone. A row takes no more time where the minutes more are 0.0 or less, or at most their own"
        " deviation.",
        "",
        "![Gain and minutes of the rows of all papers](across.png)",
    ]
    return "\n".join(lines) + "\n"


def minutes_cells(compared: Comparison) -> list[str]:
    """The minutes more, and the gain for each of them."""
    if (more := compared.minutes_more) is None:
        return ["other machine", "–"]
    shown, minutes = with_deviation(more, digits=1, sign="+"), statistics.mean(more)
    if round(minutes, 1) <= 0 or (len(more) > 1 and minutes <= statistics.stdev(more)):
        return [shown, "no more time"]
    return [shown, f"{statistics.mean(compared.gains) / minutes:+.4f}"]


# Figures ------------------------------------------------------------------------------------------------------------


def draw_paper(path: Path, compared: Sequence[Comparison]) -> None:
    """A line for each row: what it gains, published and ours, and both numbers beside it."""
    figure = Figure(figsize=(10, 1 + 0.55 * len(compared)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.5", linewidth=1)

    def write(text: str, x: float, y: float, points: float, colour: str, align: str = "left", up: float = 0) -> None:
        """Text some points to the right of the axes, or with `x` 0 to the left of them, in the line of a row."""
        at_row = axes.get_yaxis_transform()
        drawn = axes.annotate(text, (x, y), (points, up), xycoords=at_row, textcoords="offset points", fontsize=9)
        drawn.set(color=colour, ha=align, va="center")

    for y, each in enumerate(compared):
        if y % 2:
            axes.axhspan(y - 0.5, y + 0.5, color="0.96", zorder=0)
        spread = statistics.stdev(each.gains) if len(each.gains) > 1 else None
        ours = statistics.mean(each.gains) if each.gains else None
        for place, colour, value, error in ((-0.15, PUBLISHED, each.published, None), (0.15, OURS, ours, spread)):
            if value is not None:
                axes.errorbar(value, y + place, xerr=error, fmt="o", color=colour, markersize=5, capsize=3)
        title = textwrap.wrap(each.row.row.title, 57)
        write("\n".join([*title, ""]), 0, y, -8, "black", "right")
        write(
            "\n".join([*([""] * len(title)), f"{each.row.row.name} less {each.base.row.name}"]),
            0,
            y,
            -8,
            "0.45",
            "right",
        )
        write("–" if each.published is None else f"{each.published:+.3f}", 1, y, 8, PUBLISHED)
        write(with_deviation(each.gains, digits=3, sign="+") if each.gains else "–", 1, y, 68, OURS)
    write("published", 1, -0.5, 8, PUBLISHED, up=10)
    write("ours", 1, -0.5, 68, OURS, up=10)
    axes.set_yticks([])
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("difference of the overall scores on dev", fontsize=9)
    save(figure, path)


def draw_across(path: Path, compared: Sequence[Comparison]) -> None:
    """A point for each row, its minutes and its gain; the most and the least gain of each paper are named."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="0.5", linewidth=1)
    points, names = [], []
    for index, number in enumerate(COMPARED_WITH):
        colour = f"C{index}"
        mine = [each for each in compared if each.paper.number == number]
        if not mine:
            continue
        places = [(statistics.mean(each.minutes), statistics.mean(each.gains)) for each in mine]
        axes.plot(*zip(*places, strict=True), "o", color=colour, markersize=6, label=number)
        rows = [each.row for each in mine]
        bases = {statistics.mean(minutes(base) for _, base, _ in each.pairs) for each in mine if each.base not in rows}
        axes.plot([*bases], [0] * len(bases), "o", color=colour, markersize=6, fillstyle="none")
        points += [*places, *((minutes, 0.0) for minutes in bases)]
        by_gain = sorted(range(len(mine)), key=lambda at: places[at][1])
        names += [(places[at], mine[at].recipe, colour) for at in dict.fromkeys((by_gain[-1], by_gain[0]))]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("minutes of training (hollow: a row that others are compared with)", fontsize=9)
    axes.set_ylabel("gain in the overall score on dev", fontsize=9)
    axes.margins(0.1)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="paper", fontsize=9, title_fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # places the axes
    place_names(axes, points, names)
    save(figure, path)


def place_names(
    axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[tuple[tuple[float, float], str, str]]
) -> None:
    """Write each name beside its point, where it is least in the way of points and of earlier names."""
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(points)]
    inside = axes.get_window_extent()
    offsets = [(dx, dy) for dy in (0, 14, -14, 28, -28, 42, -42) for dx in (10, -10)]
    for place, name, colour in names:
        text = axes.annotate(name, place, offsets[0], textcoords="offset points", va="center", fontsize=9, color=colour)

        def covered(offset: tuple[float, float], text: Any = text) -> int:
            text.set_position(offset)
            text.set_ha("left" if offset[0] > 0 else "right")
            box = text.get_window_extent()
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            return sum(box.overlaps(other) for other in taken) + 100 * outside

        offset = min(offsets, key=covered)
        covered(offset)
        taken.append(text.get_window_extent())
        if offset[1]:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 3}
            axes.annotate("", place, offset, textcoords="offset points", arrowprops=line)


def save(figure: Figure, path: Path) -> None:
    """Write a picture that is the same each time: without date and version."""
    figure.savefig(path, dpi=100, facecolor="white", metadata={"Software": None})


# The command line -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    parser = OneLineErrors(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=PAGES, help="directory of 000.json to 004.json (docs/papers)")
    parser.add_argument("--out", type=Path, default=PAGES, help="directory of the pages and figures (docs/papers)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is out of date")
    options = parser.parse_args(arguments)
    tables = read_tables(options.tables)
    pages = {table.paper.number: paper_page(table) for table in tables}
    figures: dict[str, tuple[Callable[[Path, Sequence[Comparison]], None], list[Comparison]]] = {
        table.paper.number: (draw_paper, table.compared()) for table in tables
    }
    ran = [each for table in tables for each in table.compared() if each.pairs]
    pages["across"], figures["across"] = across_page(ran), (draw_across, ran)
    figures = {name: figure for name, figure in figures.items() if figure[1]}
    if options.check:
        return check(options.out, pages, figures)
    with writing(options.out, "choose another --out"):
        options.out.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            write_atomically(options.out / f"{name}.md", text)
        for name, (draw, compared) in figures.items():
            draw(options.out / f"{name}.png", compared)
    print(f"written to {options.out}: {', '.join(pages)}, each .md, and .png of {', '.join(figures) or 'none'}")
    return 0


def check(out: Path, pages: Mapping[str, str], figures: Iterable[str]) -> int:
    """Whether the pages are there and up to date, and the figures there: 0, or 1 after a line that names the others."""
    paths = {out / f"{name}.md": text.encode() for name, text in pages.items()}
    stale = [path for path, text in paths.items() if not path.exists() or path.read_bytes() != text]
    stale += [path for name in figures if not (path := out / f"{name}.png").exists()]
    if stale:
        print(f"not what the tables give: {', '.join(map(str, stale))}; run python bench/paper_pages.py")
    return int(bool(stale))


if __name__ == "__main__":
    cli.run(main)
