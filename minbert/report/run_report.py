"""The report of one run: RUN/report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from minbert.config import TrainConfig
from minbert.data import Source, read_skipped
from minbert.errors import UserError
from minbert.files.atomic import readable
from minbert.report import class_analysis, error_analysis, training_history
from minbert.report.error_analysis import Example, shown
from minbert.report.html_page import metric, score, write_page
from minbert.report.svg_charts import NAMED, confusion_map, scatter
from minbert.report.training_charts import gradient_figures, palette, training_figures
from minbert.report.training_history import Record
from minbert.runs.checkpoint import load_tasks
from minbert.runs.epochs import epochs
from minbert.runs.predictions import label_text
from minbert.runs.run_directory import Run
from minbert.tasks import Task

SPLIT = "dev"
SHOWN = 200  # mistakes of a task at most
MOST_IN_TABLE = 10  # classes of a confusion matrix with numbers in its cells
MOST_IN_MAP = 200  # of one without; of more classes the confused pairs are listed alone
MOST_CLASSES = 500  # rows of the table of classes: the most frequent ones
SOME = 12  # labels of a mistake at most
LONG = 20  # characters of a class for which the tables of classes are as wide as the page
MEAN = {"classification": "mean label", "regression": "mean label", "multilabel": "mean classes"}


def write_report(run: Run, data: str | None = None, tasks_file: str | None = None) -> Path:
    """Write RUN/report.html: scores, curves, conflicts, SMART, time, options, and each task's mistakes on dev.

    Args:
        data, tasks_file: where the dev split is (`Run.source`); the run's own training data when left out. Where it
            cannot be read, or is not what the run predicted, the report says so and shows no texts.

    Raises:
        UserError: `run` is no run, a file of it is damaged, or the disk is full.
    """
    config, records, summary = run.config(), run.metrics.records(), run.summary()
    tasks = load_tasks(readable(run.best), config.chosen_tasks(config.tasks or []))
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
        epochs=epochs(records),
        training=training_figures(records, colours),
        gradients=gradient_figures(records, colours),
        phases=training_history.phases(records),
        options=training_history.options(config),
        kernels={backend: [op for op in backends if backends[op] == backend] for backend in backends.values()},
        sections=[
            task_section(run, task, source) for task in tasks if not task.head_of or run.predictions(task, SPLIT)
        ],
        data=data_names(config),
        skipped=[
            (*key, list(rows)) for key, rows in groupby(read_skipped(run.skipped), lambda row: (row.split, row.task))
        ],
    )


# What the sections show --------------------------------------------------------------------------------------------


def data_names(config: TrainConfig) -> str:
    """What the run was trained on."""
    own = f"own tasks: {', '.join(config.own_tasks)}" if config.own_tasks else ""
    data = config.data or ("" if own else "built-in demo corpus")
    return "; ".join(filter(None, (data, own)))


def method(config: TrainConfig) -> list[str]:
    """The surgery of the run, and the regularisers of its losses."""
    parts = [config.surgery] if config.mode == "finetune" else ["frozen encoder"]
    if config.smart.on:
        parts.append(config.smart.title)
    if config.rdrop.on:
        parts.append("R-Drop")
    return [*parts, "Bregman"] if config.bregman.mu else parts


@dataclass(frozen=True)
class Card:
    """A score of the headline, and the further ones of the task."""

    title: str
    metric: str
    score: float
    others: Mapping[str, float] = field(default_factory=dict)


def headline(tasks: Sequence[Task], records: Sequence[Record], summary: dict[str, Any]) -> list[Card]:
    """The scores, overall and of each task, at the best epoch (in an unfinished run, at the last one)."""
    scored = epochs(records)
    if not scored:
        return []
    number = summary["best_epoch"] if summary else len(scored)
    if number > len(scored):
        raise UserError(f"the best epoch is {number}, but metrics.jsonl has {len(scored)}; restore it from a copy")
    best = scored[number - 1]
    cards = [Card("Overall", "mean of the tasks", best.overall)]
    for task in tasks:
        if scores := best.metrics.get(task.name):
            (metric, score), *others = scores.items()
            cards.append(Card(task.title, metric, score, dict(others)))
    return cards


def task_section(run: Run, task: Task, source: Source | str) -> dict[str, Any]:
    """What task.html shows of a task on dev: its predictions, analysed, or in `missing` why there is nothing."""
    found = run.predictions(task, SPLIT)
    if not found:
        return {"task": task, "missing": f"No predictions yet; minbert evaluate {run.path} writes them."}
    if any(prediction.label is None for prediction in found):
        return {"task": task, "missing": "The dev split has no labels."}
    texts, texts_missing = _texts(task, source, [prediction.id for prediction in found])
    examples = [Example(prediction, texts[i] if texts else ()) for i, prediction in enumerate(found)]
    properties = error_analysis.properties(task, with_texts=bool(texts))
    mistakes = error_analysis.mistakes(task, examples)
    scores = error_analysis.scores(task, examples)
    section = dict.fromkeys(
        (
            "scatter",
            "labels",
            "class_names",
            "classes",
            "pairs",
            "confusion",
            "map",
            "numbered",
            "wide",
            "cell",
            "matrix_width",
        )
    )
    if not task.is_regression:
        section |= _of_classes(task, examples)
    if task.is_regression:
        pairs = [(example.label, example.predicted) for example in examples]
        note = f"{metric(task.metric)} {score(scores[task.metric])}. On the line, a prediction is right."
        title = f"Predicted against true {shown(task.label, 60)}"
        section["scatter"] = scatter(title, pairs, task.scale, note)
    return section | {
        "task": task,
        "missing": "",
        "examples": len(examples),
        "scores": scores,
        "facts": error_analysis.facts(task, examples),
        "mean": MEAN[task.type] if task.is_multilabel or error_analysis.is_ordered(task) else "",
        "ordered": error_analysis.is_ordered(task),
        "decimals": error_analysis.decimals(task),
        "groups": error_analysis.groups(task, examples, properties),
        "properties": properties,
        "mistakes": [
            (example, [each.cell(example) for each in properties], _several(task, example))
            for example in mistakes[:SHOWN]
        ],
        "wrong": len(mistakes),
        "texts_missing": texts_missing,
    }


def _of_classes(task: Task, examples: Sequence[Example]) -> dict[str, Any]:
    """What the section of a task with classes shows of them."""
    labels = [label_text(label) for label in task.classes or ()]
    names = [
        shown(f"{label} {name}") for label, name in zip(labels, task.class_names or [""] * len(labels), strict=True)
    ]
    rows = class_analysis.class_scores(task, examples)
    section: dict[str, Any] = {
        "labels": labels,
        "class_names": task.class_names,
        "wide": task.is_multilabel or max(map(len, names)) > LONG,
        "classes": sorted(rows, key=lambda row: -row.support)[:MOST_CLASSES] if len(rows) > MOST_CLASSES else rows,
        "pairs": class_analysis.confused_pairs(task, examples) if task.is_multilabel or task.num_classes > 2 else [],
    }
    if not task.is_multilabel and task.num_classes <= MOST_IN_TABLE:
        section["confusion"] = class_analysis.confusion(task, examples).tolist()
        longest = max(len(word) for name in names for word in name.split() or [""])
        section["cell"] = min(max(3.6, 0.8 + 0.55 * longest), 8.0)  # rem, by the longest word of a class
        section["matrix_width"] = 7 + section["cell"] * (task.num_classes + 1)
    elif not task.is_multilabel and task.num_classes <= MOST_IN_MAP:
        note = "Each row is a true class; a cell's strength is its share of the row. The pointer over a cell names it."
        counts = class_analysis.confusion(task, examples)
        section["map"] = confusion_map("Confusion matrix", counts, [name.strip() for name in names], note)
        section["numbered"] = task.num_classes > NAMED
    return section


@dataclass(frozen=True)
class Several:
    """Labels of a multi-label example, or what is predicted for it: classes and whether each is wrong."""

    shown: list[tuple[int, bool]]  # the wrong ones and as many others as there is room for, in the task's order
    left_out: int


def _several(task: Task, example: Example) -> list[Several]:
    """The true and the predicted labels of a multi-label example; nothing of another task."""
    if not task.is_multilabel:
        return []
    found = []
    for these, those in ((example.label, example.predicted), (example.predicted, example.label)):
        labels = [(number, not those[number]) for number, each in enumerate(these) if each]
        some = sorted(sorted(labels, key=lambda label: not label[1])[:SOME])
        found.append(Several(some, len(labels) - len(some)))
    return found


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
