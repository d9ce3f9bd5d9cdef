"""Predict with a run: `python -m minbert.predict RUN --task sst --input FILE`, or `--input -` for standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minbert import cli, kernels
from minbert.console import Terminal
from minbert.data import Examples, encode, read_examples
from minbert.device import resolve_device
from minbert.errors import UserError
from minbert.evaluate import head_outputs, load_model, run_tasks
from minbert.files import write_atomically, writing
from minbert.metrics import predictions
from minbert.model import reading
from minbert.runs import Run, format_predictions
from minbert.tasks import Task


@dataclass(frozen=True)
class PredictConfig:
    """Predict one task for a file of sentences, in the course's format (`id , prediction`).

    Args:
        task: a task the run was trained on: sst, qqp, sts or cfimdb.
        input: CS224N file (tab-separated with a header), or text with a sentence or a tab-separated pair on each line;
            - reads such lines from standard input.
        output: file to write; standard output when left out.
        checkpoint: best or last.
        device: auto, cpu, cuda or cuda:N.
    """

    task: str
    input: str
    output: str | None = None
    checkpoint: Literal["best", "last"] = "best"
    device: str = "auto"


def main(arguments: Sequence[str]) -> int:
    parser = cli.Parser("predict", PredictConfig, description="Predict one task for a file of sentences.")
    parser.add_argument("run", type=str, help="run directory")
    options = parser.parse(arguments)
    run = Run(options.run)
    config, console = run.config(), Terminal(stderr=True)
    (task,) = run_tasks(config, [options.task])
    examples = read_input(task, options.input)
    for skipped in examples.skipped:
        console.print(f"skipped {skipped.file}, line {skipped.line}: {skipped.reason}")
    device = resolve_device(options.device)
    kernels.set_backend(config.backend)
    model, tokenizer = load_model(run.path / options.checkpoint, config, device)
    limit = config.max_length or model.encoder.config.max_position_embeddings
    encoded = encode(examples, tokenizer, limit, reading=reading(task))
    if encoded.truncated:
        console.print(
            f"{encoded.truncated} {'examples' if encoded.width == 1 else 'sequences'} were cut to {limit} tokens"
        )
    predicted = predictions(task, head_outputs(model, task, encoded, device))
    text = "".join(format_predictions(task, encoded.ids, predicted))
    if options.output is None:
        sys.stdout.write(text)
    else:
        try:
            with writing(Path(options.output), "free some space"):
                write_atomically(Path(options.output), text)
        except OSError as error:
            raise UserError(f"--output {options.output}: cannot be written ({error.strerror})") from None
    return 0


def read_input(task: Task, name: str) -> Examples:
    """Examples of `task` from a file with a header, or from bare lines numbered from 0.

    Raises:
        UserError: the file cannot be read, is empty, or no line of it is an example.
    """
    if name == "-":
        return _from_lines(task, "standard input", sys.stdin.read())
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    header = text.split("\n", 1)[0].split("\t")
    if set(task.columns) <= set(header):
        return read_examples(path, task, labels="ignored")
    return _from_lines(task, name, text)


def _from_lines(task: Task, name: str, text: str) -> Examples:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"--input {name} is empty; expected a {_shape(task)} per line")
    rows = [[part.strip() for part in line.split("\t")] for _, line in lines]
    for (number, _), row in zip(lines, rows, strict=True):
        if len(row) != len(task.columns) or not all(row):
            raise UserError(f"--input {name}, line {number}: expected a {_shape(task)}, got {len(row)} fields")
    pairs = [row[1] for row in rows] if task.is_pair else None
    return Examples([str(i) for i in range(len(rows))], [row[0] for row in rows], pairs, None, [])


def _shape(task: Task) -> str:
    return "pair of sentences separated by a tab" if task.is_pair else "sentence"


if __name__ == "__main__":
    cli.run(main)
