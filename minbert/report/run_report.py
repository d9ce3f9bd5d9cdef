"""The report of one run: RUN/report.html."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from minbert.config import TrainConfig
from minbert.data import Source, read_skipped
from minbert.errors import UserError
from minbert.report import error_analysis, training_history
from minbert.report.error_analysis import Example
from minbert.report.html_page import write_page
from minbert.report.svg_charts import scatter
from minbert.report.training_charts import gradient_figures, palette, training_figures
from minbert.report.training_history import Record
from minbert.runs.run_directory import Run
from minbert.tasks import Task

SPLIT = "dev"
SHOWN = 200  # mistakes of a task at most


def write_report(run: Run, data: str | None = None, tasks_file: str | None = None) -> Path:
    """Write RUN/report.html: scores, curves, conflicts, SMART, time, options, and each task's mistakes on dev.

    Args:
        data, tasks_file: where the dev split is (`Run.source`); the run's own training data when left out. Where it
            cannot be read, or is not what the run predicted, the report says so and shows no texts.

    Raises:
        UserError: `run` is no run, a file of it is damaged, or the disk is full.
    """
    config, records, summary = run.config(), run.metrics.records(), run.summary()
    tasks = config.chosen_tasks(config.tasks or [])
    colours = palette([task.name for task in tasks])
    source = _opened(run, config, data, tasks_file)
    backends = summary.get("backends", {})
    return write_page(
        run.path / "report.html",
        "run.html",
        name=run.path.resolve().name,
        config=config,
        method=method(config),
        summary=summary,
        headline=headline(tasks, records, summary),
        epochs=training_history.epochs(records),
        training=training_figures(records, colours),
        gradients=gradient_figures(records, colours),
        phases=training_history.phases(records),
        options=training_history.options(config),
        kernels={backend: [op for op in backends if backends[op] == backend] for backend in backends.values()},
        sections=[task_section(run, task, source) for task in tasks],
        skipped=[
            (*key, list(rows)) for key, rows in groupby(read_skipped(run.skipped), lambda row: (row.split, row.task))
        ],
    )


# What the sections show --------------------------------------------------------------------------------------------


def method(config: TrainConfig) -> list[str]:
    """The surgery of the run, and the regularisers of its losses."""
    parts = [config.surgery] if config.mode == "finetune" else ["frozen encoder"]
    if config.smart.on:
        parts.append("SMART")
    return [*parts, "Bregman"] if config.bregman.mu else parts


def headline(tasks: Sequence[Task], records: Sequence[Record], summary: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Title, metric and score, overall and of each task, at the best epoch (in an unfinished run, at the last one)."""
    epochs = training_history.epochs(records)
    if not epochs:
        return []
    number = summary["best_epoch"] if summary else len(epochs)
    if number > len(epochs):
        raise UserError(f"the best epoch is {number}, but metrics.jsonl has {len(epochs)}; restore it from a copy")
    best = epochs[number - 1]
    of_tasks = [(task.title, task.metric, best.scores[task.name]) for task in tasks if task.name in best.scores]
    return [("Overall", "mean of the tasks", best.overall), *of_tasks]


def task_section(run: Run, task: Task, source: Source | str) -> dict[str, Any]:
    """What task.html shows of a task on dev: its predictions, analysed, or in `missing` why there is nothing."""
    found = run.predictions(task, SPLIT)
    if not found:
        return {"task": task, "missing": f"No predictions yet; python -m minbert.evaluate {run.path} writes them."}
    if any(prediction.label is None for prediction in found):
        return {"task": task, "missing": "The dev split has no labels."}
    texts, texts_missing = _texts(task, source, [prediction.id for prediction in found])
    examples = [Example(prediction, texts[i] if texts else ()) for i, prediction in enumerate(found)]
    properties = error_analysis.properties(task, with_texts=bool(texts))
    mistakes = error_analysis.mistakes(task, examples)
    score = error_analysis.score(task, examples)
    section: dict[str, Any] = {"confusion": None, "scatter": None}
    if task.is_regression:
        pairs = [(example.label, example.prediction.predicted) for example in examples]
        note = f"Pearson correlation {score:.3f}. On the line, a prediction is right."
        section["scatter"] = scatter("Predicted against true similarity", pairs, task.max_label, note)
    else:
        section["classes"] = task.names_of_classes
        section["confusion"] = error_analysis.confusion(task, examples)
    return section | {
        "task": task,
        "missing": "",
        "examples": len(examples),
        "score": score,
        "facts": error_analysis.facts(task, examples),
        "groups": error_analysis.groups(task, examples, properties),
        "properties": properties,
        "mistakes": [(example, [each.cell(example) for each in properties]) for example in mistakes[:SHOWN]],
        "wrong": len(mistakes),
        "texts_missing": texts_missing,
    }


def _opened(run: Run, config: TrainConfig, data: str | None, tasks_file: str | None) -> Source | str:
    """The source, or why it cannot be read."""
    try:
        return run.source(config, data, tasks_file)
    except UserError as error:
        return str(error)


def _texts(task: Task, source: Source | str, ids: Sequence[str]) -> tuple[list[tuple[str, ...]], str]:
    """The texts of the examples with these ids, or none and why."""
    if isinstance(source, str):
        return [], source
    try:
        examples = source.load(task, SPLIT)
    except UserError as error:
        return [], str(error)
    if examples.ids != ids:
        return [], f"{source.name} holds other examples than those the run predicted"
    return list(zip(examples.texts, examples.pairs, strict=True) if examples.pairs else zip(examples.texts)), ""
