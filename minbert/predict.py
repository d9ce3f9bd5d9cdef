"""Predict with a run: `python -m minbert.predict RUN --task sst --input FILE`, or `--input -` for standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minbert import cli
from minbert.console import Terminal
from minbert.data import encode, read_file, refuse_skipped, skipped_lines, skipped_rows, write_skipped
from minbert.device import keep_freed_memory, resolve_device
from minbert.files.atomic import write_atomically, writing
from minbert.inference import choose_kernels, head_outputs, load_model, run_tasks, with_thresholds_of
from minbert.model import pair_encoding
from minbert.runs.predictions import format_predictions
from minbert.runs.run_directory import Run


@dataclass(frozen=True)
class PredictConfig:
    """Predict one task for a file of texts.

    The output of a task of the CS224N project is in the project's format (`id , prediction`); of any other task it is
    CSV with id, prediction, and the probability of each class.

    Args:
        run: run directory.
        task: a task of the run, such as sst, qqp, sts or cfimdb.
        input: file of the course or of GLUE (tab-separated with a header), JSON objects on lines, for own tasks any
            file that they are trained on with their text columns, or text with a sentence or a tab-separated pair on
            each line, whose id is the line's number, from 0; - is standard input. Names, headers and fields are read
            as in training (minbert/data/formats.py).
        output: file to write; standard output by default.
        skipped: file for a list of all rows that cannot be used, with line, id and reason; standard error names the
            first few.
        strict: refuse an input with such a row.
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
    run = Run(options.run)
    config, console = run.config(), Terminal(stderr=True)
    task, *_ = run_tasks(config, [options.task])
    examples = read_file(options.input, task, labels="ignored", bare=True, option="--input")
    if options.strict:
        refuse_skipped(examples.skipped)
    for line in skipped_lines(examples.skipped, options.skipped or "--skipped FILE lists all of them"):
        console.print(line)
    device = resolve_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    choose_kernels(config, console)
    model, tokenizer = load_model(run.path / options.checkpoint, config, device)
    limit = config.max_length or model.encoder.config.max_position_embeddings
    encoded = encode(examples, tokenizer, limit, pair_encoding=pair_encoding(task))
    for line in encoded.warnings(limit):
        console.print(f"warning: {line}")
    outputs = head_outputs(model, task, encoded, device)
    text = "".join(format_predictions(with_thresholds_of(model, task), encoded.ids, outputs))
    if options.skipped is not None:
        with writing(Path(options.skipped), "choose another --skipped"):
            write_skipped(Path(options.skipped), skipped_rows("input", task.name, examples.skipped))
    if options.output is None:
        sys.stdout.write(text)
        return 0
    path = Path(options.output)
    with writing(path, "choose another --output"):
        if path.exists() and not path.is_file():  # a device or a pipe, which must not be replaced
            path.write_text(text, encoding="utf-8")
        else:
            write_atomically(path, text)
    return 0


if __name__ == "__main__":
    cli.run(main)
