"""Export a run: `python -m minbert.export RUN --to onnx --out DIR`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minbert import cli
from minbert.config import TrainConfig
from minbert.console import InferenceProgress, Terminal, score_table
from minbert.data import Examples
from minbert.errors import UserError
from minbert.export import classifier, onnx_graph, sentence_encoder
from minbert.export.trained import CPU, Trained, built_in_examples, dev_examples, some_of
from minbert.files.atomic import check_vacant, new_directory, writing
from minbert.inference import kernels_of, load_model, run_tasks
from minbert.runs.run_directory import Run
from minbert.tasks import Task
from minbert.tasks.metrics import overall, predictions, probabilities, score

FORMATS = {"onnx": onnx_graph, "transformers": classifier, "sentence-transformers": sentence_encoder}


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's model for other programs, and compare it with minbert on the sentences of the dev split.

    Args:
        run: run directory.
        to: onnx is a graph for onnxruntime, of any head; transformers a directory for its text-classification pipeline,
            of linear heads; sentence-transformers a directory that turns sentences into vectors.
        out: directory to create.
        task: the task to export. When left out, all of the run's: an ONNX graph has an output for each of them, if
            their heads read examples alike.
        checkpoint: best or last.
        data: source of the dev split; by default the run's training data.
        tasks_file: tasks file that names the files of the run's own tasks; by default those that it was trained with.
        int8: for onnx, write a graph with int8 weights too, and the dev scores of both.
    """

    run: str
    to: Literal["onnx", "transformers", "sentence-transformers"]
    out: str
    task: str | None = None
    checkpoint: Literal["best", "last"] = "best"
    data: str | None = None
    tasks_file: str | None = None
    int8: bool = False

    def __post_init__(self) -> None:
        if self.int8 and self.to != "onnx":
            raise UserError(f"--int8 is of --to onnx, and this is --to {self.to}; leave it out")


def main(arguments: Sequence[str]) -> int:
    options = cli.parse("export", ExportConfig, arguments, positional="run")
    out, kind = Path(options.out), FORMATS[options.to]
    with writing(out, "choose another --out"):
        check_vacant(out)
    if missing := [name for name in kind.PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"--to {options.to} needs {missing[0]}: pip install 'minbert[{options.to}]'")
    run, console = Run(options.run), Terminal()
    config = run.config().replace(precision="fp32", split_master_weights=False)
    with kernels_of(config, Terminal(stderr=True).print):
        export(run, config, options, console)
    return 0


def export(run: Run, config: TrainConfig, options: ExportConfig, console: Terminal) -> None:
    """Write --out and compare it with the run's model; raises a UserError where that is not possible."""
    out, kind = Path(options.out), FORMATS[options.to]
    trained = load(run, config, options)
    tasks = trained.tasks
    kind.check(trained)
    source, dev = read_dev(run, config, options, tasks)
    console.print(f"{run.path}/{options.checkpoint}: {', '.join(f'{task.title} ({task.head})' for task in tasks)}")
    console.print(f"data: {source}")
    with writing(out, "choose another --out"), new_directory(out) as directory:
        kind.write(trained, directory)
        console.print(f"{options.to}: {_size(directory)} written; comparing it with minbert")
        for task in tasks:
            compare(trained, directory, options.to, task, dev, console)
        if options.int8:
            onnx_graph.quantise(directory)
            console.print(int8_scores(directory, tasks, dev, console))
        for line in kind.notes(trained):
            console.print(line)
    console.print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def load(run: Run, config: TrainConfig, options: ExportConfig) -> Trained:
    """The checkpoint with the tasks to export: the one that is named, else all that have a dev split.

    Raises:
        UserError: the run has no such task, or the checkpoint is missing or damaged.
    """
    named = run_tasks(config, [options.task] if options.task else None)
    model, tokenizer = load_model(run.path / options.checkpoint, config, CPU)
    names = dict.fromkeys(task.head_of or task.name for task in named if task.evaluated or options.task)
    limit = config.max_length or model.encoder.config.max_position_embeddings
    return Trained(model, tokenizer, [model.tasks[name] for name in names], limit)


def read_dev(
    run: Run, config: TrainConfig, options: ExportConfig, tasks: Sequence[Task]
) -> tuple[str, dict[str, Examples]]:
    """What is compared, and the dev examples by task: none where the run's own data cannot be read.

    Raises:
        UserError: it cannot be read, and --int8 needs it or an option names it.
    """
    try:
        return dev_examples(run, config, tasks, options.data, options.tasks_file)
    except UserError as error:
        if options.int8:
            raise UserError(f"{error}; --int8 needs the dev split for its scores") from None
        if (options.data, options.tasks_file) != (None, None):
            raise
        return f"the demo corpus, as the run's dev split is out of reach ({error})", {}


def compare(
    trained: Trained, directory: Path, to: str, task: Task, dev: Mapping[str, Examples], console: Terminal
) -> None:
    """Compare the exported model with minbert, and say how they agree.

    Raises:
        UserError: they do not.
    """
    examples = some_of(dev.get(task.name) or built_in_examples(task))
    of = f"of {len(dev[task.name])} dev examples" if task.name in dev else "sentences of the demo corpus"
    source = f"{len(examples)} {of}"
    found = FORMATS[to].compare(trained, directory, task, examples)
    if not found.largest <= found.accepted:
        raise UserError(f"{task.title}: the exported model {found} on {source}; nothing is written: please report it")
    console.print(f"{task.title}, {source}: {found}")


def int8_scores(directory: Path, tasks: Sequence[Task], dev: Mapping[str, Examples], console: Terminal) -> object:
    """A table of the dev scores of both graphs."""
    files = {"float32": onnx_graph.GRAPH, "int8": onnx_graph.INT8_GRAPH}
    rows = []
    with InferenceProgress(console, len(files) * sum(len(dev[task.name]) for task in tasks)) as progress:
        for label, file in files.items():
            graph, scores = onnx_graph.Graph(directory, file), {}
            for task in tasks:
                examples = dev[task.name]
                outputs = graph.outputs(examples, progress.add)[task.name]
                assert examples.labels is not None  # every dev split has some
                found = predictions(task, outputs)
                scores[task.name] = score(task, found, examples.labels, probabilities(task, outputs))
            size = (directory / file).stat().st_size
            rows.append((f"{label}, {size / 1e6:.0f} MB", scores, overall(scores, tasks)))
    return score_table("dev", rows)


def _size(directory: Path) -> str:
    return f"{sum(path.stat().st_size for path in directory.rglob('*') if path.is_file()) / 1e6:.0f} MB"


if __name__ == "__main__":
    cli.run(main)
