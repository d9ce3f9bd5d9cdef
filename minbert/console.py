"""What a run shows: what it runs on, a progress bar (plain lines when not a terminal), a table per epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from minbert.errors import one_line
from minbert.tasks import Task

SECONDS_BETWEEN_LINES = 10.0
WIDEST = 10_000  # characters of a line, where a table is measured
MOST_SCORES = 7  # columns of a table of scores that a terminal has room for


class Terminal(Console):
    """The console of every command: what it prints is text, never markup, an emoji's name or a control sequence.

    Args:
        quiet: print nothing.
        stderr: print to standard error.
    """

    def __init__(self, *, quiet: bool = False, stderr: bool = False) -> None:
        super().__init__(soft_wrap=True, quiet=quiet, stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text for a line or a table's cell; characters that are not printable become their escapes."""
        return super().render_str("\n".join(map(one_line, text.split("\n"))), **options)


def shows_bars(console: Console) -> bool:
    """Whether a line can be written over: on a terminal, and in a notebook whose widgets are installed."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


class TrainingProgress:
    """Shows how far training is: a bar on a terminal and in a notebook, else a line every ten seconds."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console = console
        self.total = total
        self.started, self.done_before = time.monotonic(), done
        self.next_line = self.started + SECONDS_BETWEEN_LINES
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} examples/s, loss {task.fields[loss]:.3f}, left", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not shows_bars(console),
            transient=True,
        )
        self.task = self.bar.add_task("training", total=total, completed=done, rate=0.0, loss=float("nan"))

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, step: int, epoch: str, examples_per_second: float, loss: float) -> None:
        self.bar.update(self.task, completed=step, description=epoch, rate=examples_per_second, loss=loss)
        now = time.monotonic()
        if self.bar.disable and now >= self.next_line:
            self.next_line = now + SECONDS_BETWEEN_LINES
            left = (now - self.started) / max(step - self.done_before, 1) * (self.total - step)
            self.console.print(
                f"{epoch}, step {step}/{self.total}, {examples_per_second:.0f} examples/s, "
                f"loss {loss:.3f}, {left:.0f} s left"
            )


class InferenceProgress:
    """Shows how far predicting is: a line that is written over on a terminal, else one every ten seconds.

    Args:
        total: examples, if it is known.
        live: whether a terminal shows a line that is written over.
        title: begins the lines.
    """

    def __init__(self, console: Console, total: int | None = None, *, live: bool = True, title: str = "") -> None:
        self.console, self.total, self.title = console, total, title
        self.examples = self.tokens = 0
        self.started = time.monotonic()
        self.next_line = self.started + SECONDS_BETWEEN_LINES
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not (live and shows_bars(console)),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.bar.add_task("")

    def __enter__(self) -> InferenceProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def add(self, examples: int, tokens: int) -> None:
        """Count the examples and tokens of a batch."""
        self.examples += examples
        self.tokens += tokens
        now = time.monotonic()
        if self.bar.disable and now < self.next_line:
            return
        self.next_line = now + SECONDS_BETWEEN_LINES
        self.bar.update(self.task, description=str(self))
        if self.bar.disable:
            self.console.print(str(self))

    def __str__(self) -> str:
        """Examples so far, with the throughput since the beginning."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        of_all = "" if self.total in (None, self.examples) else f" of {self.total}"
        examples = f"{self.examples}{of_all} example{'s' * (self.examples != 1)}"
        rates = f"{self.examples / seconds:.0f} examples/s, {self.tokens / seconds:.0f} tokens/s"
        begin = f"{self.title}: " if self.title else ""
        return f"{begin}{examples}, {self.tokens} tokens in {seconds:.1f} s: {rates}"


def data_table(rows: Sequence[tuple[Task, Mapping[str, int], int, int]]) -> Table:
    """Examples to train on and to score, rows of all splits that are skipped or truncated; a row per task."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("task", "train", "dev", "rows skipped", "truncated"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, sizes, skipped, truncated in rows:
        table.add_row(task.title, str(sizes["train"]), str(sizes["dev"]), str(skipped), str(truncated))
    return table


def score_table(title: str, rows: Sequence[tuple[str, Mapping[str, Mapping[str, float]], float]]) -> NarrowTables:
    """Scores by task and overall, a row per epoch or split: (label, scores of each task, overall score).

    Many scores make columns of the epochs or splits, and rows of the scores; of many epochs it is each task's first
    metric. A score that is not there is a dash, such as one of an epoch of an earlier minbert.
    """
    of_task: dict[str, list[str]] = {}
    for _, scores, _ in rows:
        for name, score in scores.items():
            of_task[name] = list(dict.fromkeys([*of_task.get(name, ()), *score]))
    shown = [(name, metric) for name, metrics in of_task.items() for metric in metrics]
    if min(len(shown), len(rows)) > MOST_SCORES:
        shown = [(name, metrics[0]) for name, metrics in of_task.items()]
    labels = [label for label, *_ in rows]
    cells = [
        ["–" if value is None else f"{value:.3f}" for value in (*(scores.get(n, {}).get(m) for n, m in shown), overall)]
        for _, scores, overall in rows
    ]
    if len(shown) <= MOST_SCORES or len(rows) > len(shown):
        columns = [*(f"{name}\n{metric}" for name, metric in shown), "overall"]
        return NarrowTables(title, columns, labels, list(map(list, zip(*cells, strict=True))))
    return NarrowTables(title, labels, [*(f"{name} {metric}" for name, metric in shown), "overall"], cells)


@dataclass(frozen=True)
class NarrowTables:
    """A table whose cells are never cut: columns for which a line has no room are in further tables below it.

    Args:
        columns: their headers, of one line or several.
        labels: of the rows.
        cells: by column and row.
    """

    title: str
    columns: Sequence[str]
    labels: Sequence[str]
    cells: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title, first = self.title, 0
        while first < len(self.columns):
            table, count = self._table(title, first, len(self.columns)), len(self.columns) - first
            while (
                count > 1 and Measurement.get(console, options.update(width=WIDEST), table).maximum > options.max_width
            ):
                count -= 1
                table = self._table(title, first, first + count)
            yield table
            title, first = "", first + count

    def _table(self, title: str, first: int, end: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold")
        table.add_column("", max_width=28, overflow="fold")
        for column in self.columns[first:end]:
            table.add_column(column, max_width=17, overflow="fold", justify="right", vertical="bottom")
        for label, *line in zip(self.labels, *self.cells[first:end], strict=True):
            table.add_row(label, *line)
        return table
