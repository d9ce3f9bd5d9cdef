"""Predict with a run: `minbert predict RUN --task sst --input FILE`, or `--input -` for standard input."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from minbert import cli
from minbert.console import InferenceProgress, Terminal
from minbert.data import Skipped, read_windows, refuse_skipped, skipped_rows
from minbert.data.encoded import TokenWarnings
from minbert.data.skipped import SHOWN, format_skipped, skipped_lines_of_file
from minbert.device import keep_freed_memory, resolve_device
from minbert.files.atomic import replacing, writing
from minbert.inference import run_tasks
from minbert.predictor import Predictor, find
from minbert.runs.predictions import format_header, format_rows

WINDOW = 2048  # rows that are read, sorted by length and predicted before the next ones


@dataclass(frozen=True)
class PredictConfig:
    """Predict one task for a file of texts, whose results are written as they come.

    The output of a task of the CS224N project is in the project's format (`id , prediction`); of any other task it is
    CSV with id, prediction, and the probability of each class.

    Args:
        run: run directory, or what minbert push wrote: a directory, or OWNER/NAME on the hub.
        task: a task of the run, such as sst, qqp, sts or cfimdb.
        input: file of the course or of GLUE (tab-separated with a header), JSON objects on lines, for own tasks any
            file that they are trained on with their text columns, or text with a sentence or a tab-separated pair on
            each line, whose id is the line's number, from 0; - is standard input. Names, headers and fields are read
            as in training (minbert/data/formats.py).
        output: file to write; standard output by default.
        skipped: file for a list of all rows that cannot be used, with line, id and reason; standard error names the
            first few.
        strict: refuse an input with such a row: a file before any result is written, standard input and pipes at the
            row.
        checkpoint: best or last.
        device: auto, cpu, cuda or cuda:N.
    """

    run: str
    task: str
    input: str
    output: str | None = None
    skipped: str | None = None
    strict: bool = False
    checkpoint: Literal["best", "last"] = "best"
    device: str = "auto"


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("predict", PredictConfig, arguments, positional="run")
    (checkpoint, config), console = find(options.run, options.checkpoint), Terminal(stderr=True)
    task, *_ = run_tasks(config, [options.task])
    if options.strict and Path(options.input).is_file():  # before a result is written; a pipe is read once
        for examples in read_windows(options.input, task, WINDOW, option="--input"):
            refuse_skipped(examples.skipped)
    windows = read_windows(options.input, task, WINDOW, option="--input")
    first = next(windows)
    if resolve_device(options.device).type == "cpu":
        keep_freed_memory()
    predictor = Predictor(checkpoint, config, options.device, console.print)
    task, warnings = predictor.task(options.task), TokenWarnings(predictor.max_length)
    skipped, has_header = SkippedRows(task.name, options.skipped), False
    live = options.output is not None or not sys.stdout.isatty()
    with (
        skipped,
        results_file(options.output) as results,
        InferenceProgress(console, live=live) as progress,
    ):
        for examples in itertools.chain([first], windows):
            skipped.add(examples.skipped)
            if options.strict:
                refuse_skipped(examples.skipped)
            if not len(examples):
                continue
            encoded, outputs = predictor.outputs(task, examples, progress.add)
            warnings.add(encoded)
            header = "" if has_header else format_header(task, outputs)
            results.write(header + "".join(format_rows(task, encoded.ids, outputs)))
            results.flush()
            has_header = True
    for line in (*skipped.lines(), *(f"warning: {line}" for line in warnings.lines()), str(progress)):
        console.print(line)
    return 0


@contextmanager
def results_file(output: str | None) -> Iterator[TextIO]:
    """Where results go: standard output, a device or a pipe, or a file that replaces another one at the end.

    Raises:
        UserError: it cannot be written.
    """
    if output is None:
        yield sys.stdout
        return
    path = Path(output)
    with writing(path, "choose another --output"):
        is_other = path.exists() and not path.is_file()  # a device or a pipe, which must not be replaced
        with open(path, "w", encoding="utf-8") if is_other else replacing(path) as file:
            yield file


class SkippedRows:
    """The input's rows that cannot be used: their number, the first of them, and in a file all.

    Args:
        path: the file, which is written anew; it is removed if there is no such row.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, task: str, path: str | None) -> None:
        self._task, self._path = task, path
        self._stack = ExitStack()
        self._file: TextIO | None = None
        self._count, self._first = 0, list[Skipped]()

    def __enter__(self) -> SkippedRows:
        return self

    def add(self, rows: Sequence[Skipped]) -> None:
        self._count += len(rows)
        self._first += rows[: SHOWN - len(self._first)]
        if rows and self._path is not None:
            path = Path(self._path)
            with writing(path, "choose another --skipped"):
                self._file = self._file or self._stack.enter_context(replacing(path))
                self._file.writelines(map(format_skipped, skipped_rows("input", self._task, rows)))

    def __exit__(self, kind: type[BaseException] | None, *others: Any) -> bool | None:
        if self._path is None:
            return None
        with writing(Path(self._path), "choose another --skipped"):
            if kind is None and not self._count:
                Path(self._path).unlink(missing_ok=True)
        return self._stack.__exit__(kind, *others)

    def lines(self) -> list[str]:
        """Their number and the first of them, for the terminal."""
        return skipped_lines_of_file(self._count, self._first, self._path or "--skipped FILE lists all of them")


if __name__ == "__main__":
    cli.run(main)
