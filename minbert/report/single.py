"""The report of one run: RUN/report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minbert.config import TrainConfig
from minbert.data import Examples, SkippedRow, Source, open_source, read_skipped
from minbert.errors import UserError
from minbert.report import analysis, history
from minbert.report.analysis import Example, Group
from minbert.report.figures import Figure, heat_map, line_chart, scatter
from minbert.report.history import Points, Record
from minbert.report.page import write_page
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
SERIES = 6  # colours that the style sheet has for lines


def write_report(run: Run, data: str | None = None) -> Path:
    """Write RUN/report.html: scores, curves, conflicts, SMART, time, options, and each task's mistakes on dev.

    Args:
        data: where the dev split is; the run's own training data when left out. Where it cannot be read, or is not
            what the run predicted, the report says so and shows no texts.

    Raises:
        UserError: `run` is no run, a file of it is damaged, or the disk is full.
    """
    config, records, summary = run.config(), run.records(), run.summary()
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
        epochs=history.epochs(records),
        training=training_figures(records, colours),
        gradients=gradient_figures(records, colours),
        phases=history.phases(records),
        options=history.options(config),
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
    """What the run did with the tasks' gradients, and what it added to their losses."""
    parts = [config.surgery] if config.mode == "finetune" else ["frozen encoder"]
    if config.smart.on:
        parts.append("SMART")
    return [*parts, "Bregman"] if config.bregman.mu else parts


def headline(tasks: Sequence[Task], records: Sequence[Record], summary: dict[str, Any]) -> list[Headline]:
    """The overall score and each task's, of the best epoch (of the last one that ended, in a run that has not)."""
    epochs = history.epochs(records)
    if not epochs:
        return []
    number = summary["best_epoch"] if summary else len(epochs)
    if number > len(epochs):
        raise UserError(f"the best epoch is {number}, but metrics.jsonl has {len(epochs)}; restore it from a copy")
    best = epochs[number - 1]
    of_tasks = [Headline(task.title, task.metric, best.scores[task.name]) for task in tasks if task.name in best.scores]
    return [Headline("Overall", "mean of the tasks", best.overall), *of_tasks]


def training_figures(records: Sequence[Record], colours: dict[str, str]) -> list[Figure]:
    """Dev scores by epoch, and the training loss of each task by step."""
    figures = []
    epochs = history.epochs(records)
    if epochs:
        lines: dict[str, Points] = {
            name: [(each.epoch, each.scores[name]) for each in epochs if name in each.scores]
            for name in epochs[0].scores
        }
        lines["overall"] = [(epoch.epoch, epoch.overall) for epoch in epochs]
        figures.append(line_chart("Dev scores", lines, "epoch", colours | {"overall": "ink"}, marked=True))
    for name, points in history.curves(records, "loss").items():
        figures.append(line_chart(f"Training loss, {name}", {name: points}, "step", colours))
    return figures


def gradient_figures(records: Sequence[Record], colours: dict[str, str]) -> dict[str, list[Figure]]:
    """Figures of surgery (conflicts and what it removes) and of SMART; none of what the run did not do."""
    surgery: list[Figure] = []
    cosine, similarity = (history.grid(records, key) for key in ("cosine", "magnitude_similarity"))
    if cosine.names and similarity.names:
        note = "Cosine of two tasks' gradients; below 0 they conflict."
        surgery.append(heat_map("Conflict", cosine, signed=True, note=note))
        note = "2|a||b| / (|a|² + |b|²): 1 for gradients of one length, near 0 where one dominates."
        surgery.append(heat_map("Magnitude similarity", similarity, signed=False, note=note))
    smart: list[Figure] = []
    for kind, key, title, note in (
        (surgery, "projected_share", "Projected share", "How much of the plain update surgery removes."),
        (smart, "smart", "SMART's regulariser", "The divergence of perturbed from clean outputs, before lambda_s."),
        (smart, "smart_share", "SMART's share of the loss", "Below 1e-4 the regulariser does next to nothing."),
        (smart, "bregman", "Bregman divergence", "From the averaged teacher's outputs, before mu."),
    ):
        lines = history.curves(records, key)
        if lines:
            kind.append(line_chart(title, lines, "step", colours | {key: "s0"}, note=note))
    return {"Gradient surgery": surgery, "Regularisers": smart}


@dataclass(frozen=True)
class TaskSection:
    """What a report says of a task; of a split without labels or predictions only why there is nothing."""

    task: Task
    missing: str = ""
    examples: int = 0
    score: float = 0.0
    facts: dict[str, str] | None = None
    classes: Sequence[str] = ()
    confusion: list[list[int]] | None = None
    scatter: Figure | None = None
    groups: Sequence[Group] = ()
    properties: Sequence[analysis.Property] = ()
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
    looked_at = analysis.properties(task, with_texts=bool(texts))
    wrong = analysis.mistakes(task, examples)
    value = analysis.score(task, examples)
    section: dict[str, Any] = {}
    if task.metric == "pearson":
        pairs = [(example.label, example.prediction.predicted) for example in examples]
        note = f"Pearson correlation {value:.3f}. On the line, a prediction is right."
        section["scatter"] = scatter("Predicted against true similarity", pairs, task.top, note)
    else:
        section["classes"] = CLASSES.get(task.name, ("",) * (task.top + 1))
        section["confusion"] = analysis.confusion(task, examples)
    return TaskSection(
        task,
        examples=len(examples),
        score=value,
        facts=analysis.facts(task, examples),
        groups=analysis.groups(task, examples, looked_at),
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


def palette(names: Sequence[str]) -> dict[str, str]:
    """The class of each task's colour."""
    return {name: f"s{number % SERIES}" for number, name in enumerate(names)}


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
