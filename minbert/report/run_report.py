"""The report of one run: RUN/report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minbert.config import TrainConfig
from minbert.data import Examples, SkippedRow, Source, open_source, read_skipped
from minbert.errors import UserError
from minbert.report import error_analysis, training_history
from minbert.report.error_analysis import Example, Group
from minbert.report.html_page import write_page
from minbert.report.svg_charts import Figure, scatter
from minbert.report.training_charts import gradient_figures, palette, training_figures
from minbert.report.training_history import Record
from minbert.runs.run_directory import Run
from minbert.tasks import Task

SPLIT = "dev"
SHOWN = 200  # mistakes of a task at most
CLASSES = {  # what labels mean
    "sst": ("negative", "somewhat negative", "neutral", "somewhat positive", "positive"),
    "qqp": ("not a paraphrase", "paraphrase"),
    "cfimdb": ("negative", "positive"),
    "sst2": ("negative", "positive"),
}


def write_report(run: Run, data: str | None = None) -> Path:
    """Write RUN/report.html: scores, curves, conflicts, SMART, time, options, and each task's mistakes on dev.

    Args:
        data: where the dev split is; the run's own training data when left out. Where it cannot be read, or is not
            what the run predicted, the report says so and shows no texts.

    Raises:
        UserError: `run` is no run, a file of it is damaged, or the disk is full.
    """
    config, records, summary = run.config(), run.metrics.records(), run.summary()
    tasks = config.chosen_tasks(config.tasks or [])
    colours = palette([task.name for task in tasks])
    source = _opened(data, run, config)
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
        kernels=kernels_by_backend(summary),
        sections=[task_section(run, task, source) for task in tasks],
        skipped=skipped_by_split(run),
    )


# What the sections show --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """A score that a run is known by."""

    title: str
    metric: str
    value: float


def method(config: TrainConfig) -> list[str]:
    """The surgery of the run, and the regularisers of its losses."""
    parts = [config.surgery] if config.mode == "finetune" else ["frozen encoder"]
    if config.smart.on:
        parts.append("SMART")
    return [*parts, "Bregman"] if config.bregman.mu else parts


def headline(tasks: Sequence[Task], records: Sequence[Record], summary: dict[str, Any]) -> list[Headline]:
    """The overall score and each task's, of the best epoch (of the last one that ended, in a run that has not)."""
    epochs = training_history.epochs(records)
    if not epochs:
        return []
    number = summary["best_epoch"] if summary else len(epochs)
    if number > len(epochs):
        raise UserError(f"the best epoch is {number}, but metrics.jsonl has {len(epochs)}; restore it from a copy")
    best = epochs[number - 1]
    of_tasks = [Headline(task.title, task.metric, best.scores[task.name]) for task in tasks if task.name in best.scores]
    return [Headline("Overall", "mean of the tasks", best.overall), *of_tasks]


@dataclass(frozen=True)
class TaskSection:
    """The section of a task; without labels or predictions it has only the reason in `missing`."""

    task: Task
    missing: str = ""
    examples: int = 0
    score: float = 0.0
    facts: dict[str, str] | None = None
    classes: Sequence[str] = ()
    confusion: list[list[int]] | None = None
    scatter: Figure | None = None
    groups: Sequence[Group] = ()
    properties: Sequence[error_analysis.Property] = ()
    mistakes: Sequence[tuple[Example, list[tuple[str, float]]]] = ()  # the first `SHOWN`, and their properties' cells
    wrong: int = 0  # of how many
    texts_missing: str = ""


def task_section(run: Run, task: Task, source: Source | str) -> TaskSection:
    """A task's predictions on dev, analysed."""
    found = run.predictions(task, SPLIT)
    if not found:
        return TaskSection(task, f"No predictions yet; python -m minbert.evaluate {run.path} writes them.")
    if any(prediction.label is None for prediction in found):
        return TaskSection(task, "The dev split has no labels.")
    texts, texts_missing = _texts(task, source, [prediction.id for prediction in found])
    examples = [Example(prediction, texts[i] if texts else ()) for i, prediction in enumerate(found)]
    looked_at = error_analysis.properties(task, with_texts=bool(texts))
    wrong = error_analysis.mistakes(task, examples)
    value = error_analysis.score(task, examples)
    section: dict[str, Any] = {}
    if task.metric == "pearson":
        pairs = [(example.label, example.prediction.predicted) for example in examples]
        note = f"Pearson correlation {value:.3f}. On the line, a prediction is right."
        section["scatter"] = scatter("Predicted against true similarity", pairs, task.max_label, note)
    else:
        section["classes"] = CLASSES.get(task.name, ("",) * (task.max_label + 1))
        section["confusion"] = error_analysis.confusion(task, examples)
    return TaskSection(
        task,
        examples=len(examples),
        score=value,
        facts=error_analysis.facts(task, examples),
        groups=error_analysis.groups(task, examples, looked_at),
        properties=looked_at,
        mistakes=[(example, [each.cell(example) for each in looked_at]) for example in wrong[:SHOWN]],
        wrong=len(wrong),
        texts_missing=texts_missing,
        **section,
    )


def skipped_by_split(run: Run) -> dict[tuple[str, str], list[SkippedRow]]:
    """The rows of the run's data that were left out, by split and task."""
    found: dict[tuple[str, str], list[SkippedRow]] = {}
    for row in read_skipped(run.skipped):
        found.setdefault((row.split, row.task), []).append(row)
    return found


def kernels_by_backend(summary: dict[str, Any]) -> dict[str, list[str]]:
    """Which ops ran on which backend."""
    found: dict[str, list[str]] = {}
    for op, backend in summary.get("backends", {}).items():
        found.setdefault(backend, []).append(op)
    return found


def _opened(data: str | None, run: Run, config: TrainConfig) -> Source | str:
    """The source, or why it cannot be read."""
    try:
        return open_source(data if data is not None else run.own_data(config))
    except UserError as error:
        return str(error)


def _texts(task: Task, source: Source | str, ids: Sequence[str]) -> tuple[list[tuple[str, ...]], str]:
    """The texts of the examples with these ids, or none and why."""
    if isinstance(source, str):
        return [], source
    try:
        examples: Examples = source.load(task, SPLIT)
    except UserError as error:
        return [], str(error)
    if examples.ids != ids:
        return [], f"{source.name} holds other examples than those the run predicted"
    return list(zip(examples.texts, examples.pairs, strict=True) if examples.pairs else zip(examples.texts)), ""
