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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from paper_comparisons import Comparison, Table, minutes, read_tables
from paper_figures import draw_across, draw_paper
from training_runs import OneLineErrors, with_deviation

from minbert import cli
from minbert.errors import one_line
from minbert.files.atomic import write_atomically, writing
from minbert.report.paper_table import RowResult, columns
from minbert.report.run_result import RunResult

PAGES = Path(__file__).parents[1] / "docs" / "papers"
NOISE_OF_ONE_SEED = 0.2  # of a run's minutes


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
    missing = [
        f"`{name}`" + "".join(f" (for want of a file for `--{need}`)" for need in row.needs)
        for name, row in table.paper.rows.items()
        if name not in run_or_failed
    ]
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
        " deviation, or with one seed a fifth of the other row's minutes: the same work takes some runs longer.",
        "",
        "![Gain and minutes of the rows of all papers](across.png)",
    ]
    return "\n".join(lines) + "\n"


def minutes_cells(compared: Comparison) -> list[str]:
    """The minutes more, and the gain for each of them."""
    if (more := compared.minutes_more) is None:
        return ["other machine", "–"]
    shown, mean = with_deviation(more, digits=1, sign="+"), statistics.mean(more)
    noise = statistics.stdev(more) if len(more) > 1 else NOISE_OF_ONE_SEED * minutes(compared.pairs[0][1])
    if round(mean, 1) <= 0 or mean <= noise:
        return [shown, "no more time"]
    return [shown, f"{statistics.mean(compared.gains) / mean:+.4f}"]


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
