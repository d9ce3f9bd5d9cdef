"""Evaluate a run: `minbert evaluate RUN --data DIR --split dev`."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minbert import cli
from minbert.config import TrainConfig
from minbert.console import InferenceProgress, Terminal, score_table
from minbert.data import (
    Examples,
    encode,
    refuse_skipped,
    skipped_lines,
    skipped_rows,
    update_skipped,
)
from minbert.device import describe, keep_freed_memory, resolve_device
from minbert.errors import UserError
from minbert.files.atomic import writing
from minbert.inference import evaluate, kernels_of, load_model, run_tasks, with_thresholds_of
from minbert.model import pair_encoding
from minbert.runs.glue_submission import is_of_glue, write_submission
from minbert.runs.predictions import write_predictions
from minbert.runs.run_directory import Run
from minbert.tasks import Task
from minbert.tasks.metrics import overall


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a run on a split and write its predictions.

    Args:
        run: run directory.
        data: source of the split; by default the run's training data. RUN/predictions/ and RUN/skipped.jsonl are of
            the best epoch and of the run's own data, as in the report. Predictions of --checkpoint last are written to
            RUN/predictions/last/; those of other data to a subdirectory named after the data, with a skipped.jsonl.
        tasks_file: tasks file that names the files of the run's own tasks; by default those that it was trained with.
        split: dev, train or test (test files may lack labels: then predictions are written without scores). For the
            test files of GLUE, the benchmark's submission files are written to RUN/predictions/glue/ too.
        tasks: tasks to evaluate; by default all of the run.
        checkpoint: best or last.
        device: auto, cpu, cuda or cuda:N.
        strict: refuse a split with a row that cannot be used.
    """

    run: str
    data: str | None = None
    tasks_file: str | None = None
    split: Literal["dev", "test", "train"] = "dev"
    tasks: list[str] | None = None
    checkpoint: Literal["best", "last"] = "best"
    device: str = "auto"
    strict: bool = False


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("evaluate", EvaluateConfig, arguments, positional="run")
    run = Run(options.run)
    config = run.config()
    console, warnings = Terminal(), Terminal(stderr=True)
    tasks = run_tasks(config, options.tasks)
    source = run.source(config, options.data, options.tasks_file, own_dev=reads_own_data(options, config))
    if (options.data, options.tasks_file) == (None, None) and (config.data is not None or config.own_tasks):
        named, other = ("tasks.yaml", "--tasks-file FILE") if config.data is None else ("config.yaml", "--data DIR")
        console.print(f"data: {source.name}, which {run.path}/{named} names; {other} reads other data")
    present = [task for task in tasks if options.split in source.splits(task)]
    if not present:
        names = ", ".join(task.name for task in tasks)
        other = "--tasks-file" if config.data is None and config.own_tasks else "--data"
        raise UserError(f"{source.name} has no {options.split} split of {names}; --split and {other} choose another")
    examples = {task.name: source.load(task, options.split) for task in present}
    skipped = [row for each in examples.values() for row in each.skipped]
    if options.strict:
        refuse_skipped(skipped)
    directory = run.predictions_directory(predictions_subdirectory(options, config))
    own = reads_own_data(options, config)
    skipped_file = run.skipped if own else directory / run.skipped.name
    for line in skipped_lines(skipped, str(skipped_file)):
        warnings.print(line)

    device = resolve_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    with kernels_of(config, warnings.print):
        model, tokenizer = load_model(run.path / options.checkpoint, config, device)
        console.print(f"{run.path}/{options.checkpoint} on {describe(device, config.precision)}")
        limit = config.max_length or model.encoder.config.max_position_embeddings
        encoded = {
            task.name: encode(examples[task.name], tokenizer, limit, pair_encoding=pair_encoding(task))
            for task in present
        }
        for task in present:
            for line in encoded[task.name].warnings(limit):
                warnings.print(f"warning: {task.title}, {options.split}: {line}")
        with InferenceProgress(console, sum(map(len, encoded.values()))) as progress:
            scores, outputs = evaluate(model, present, encoded, device, count=progress.add)
        console.print(str(progress))
    files = {(task.name, examples[task.name].file) for task in present}
    rows = [row for task in present for row in skipped_rows(options.split, task.name, examples[task.name].skipped)]
    with writing(skipped_file, "free some space and run minbert evaluate"):
        skipped_file.parent.mkdir(parents=True, exist_ok=True)
        update_skipped(skipped_file, options.split, files, rows)
    if scores:
        console.print(score_table(f"{source.name}", [(options.split, scores, overall(scores, present))]))
    for task in present:
        path = write_predictions(
            directory, with_thresholds_of(model, task), options.split, encoded[task.name], outputs[task.name]
        )
        count, num_skipped = len(encoded[task.name]), len(examples[task.name].skipped)
        notes = [f"{num_skipped} of {count + num_skipped} rows left out"] if num_skipped else []
        notes += [] if task.name in scores else [f"no labels in this split, so no {task.metric}"]
        remark = f" ({'; '.join(notes)})" if notes else ""
        console.print(f"{task.title}: {count} predictions in {path}{remark}")
    write_submissions(directory / "glue", present if options.split == "test" else [], examples, outputs)
    if absent := [task.name for task in tasks if task not in present and task.evaluated and not task.head_of]:
        warnings.print(f"warning: {source.name} has no {options.split} split of {', '.join(absent)}")
    return 0


def write_submissions(
    directory: Path, tasks: Sequence[Task], examples: Mapping[str, Examples], outputs: Mapping[str, np.ndarray]
) -> None:
    """Write the submission files of the tasks whose test files are GLUE's, and say so."""
    for task in tasks:
        if is_of_glue(task, examples[task.name]):
            path, warnings = write_submission(directory, task, examples[task.name], outputs[task.name])
            Terminal().print(f"{task.title}: {path} for the GLUE benchmark")
            for line in warnings:
                Terminal(stderr=True).print(line)


def reads_own_data(options: EvaluateConfig, config: TrainConfig) -> bool:
    """Whether the data of --data and --tasks-file (by default the run's) is the run's own."""
    return options.tasks_file is None and (options.data is None or _same_path(options.data, config.data))


def _same_path(one: str, other: str | None) -> bool:
    return one == other or (other is not None and _real_path(one) == _real_path(other))


def _real_path(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def predictions_subdirectory(options: EvaluateConfig, config: TrainConfig) -> str:
    """The directory under RUN/predictions/ for a checkpoint's predictions on some data."""
    parts: list[str] = [] if options.checkpoint == "best" else [options.checkpoint]
    if not reads_own_data(options, config):
        for given in filter(None, (options.data, options.tasks_file)):
            path = _real_path(given) if os.path.exists(os.path.expanduser(given)) else given
            name = re.sub(r"[^\w-]", "_", os.path.basename(path))[:80]
            parts.append(f"{name}-{zlib.crc32(os.fsencode(path)):08x}")
    return "/".join(parts)


if __name__ == "__main__":
    cli.run(main)
