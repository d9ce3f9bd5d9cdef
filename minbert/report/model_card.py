"""The model card of a run: README.md of what `minbert push` writes, with the hub's metadata at its top."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minbert.config import TrainConfig
from minbert.errors import dashed, one_line
from minbert.report.error_analysis import shown
from minbert.report.html_page import TEMPLATES, duration, metric, option, percent, score, signed
from minbert.report.run_report import method
from minbert.report.training_history import Record, grid, options
from minbert.runs.epochs import epochs
from minbert.runs.resume import DATA_PATHS
from minbert.tasks import Task
from minbert.tasks.tasks_file import HUB

MOST_LABELS = 30  # of a task that are listed
HUB_METRICS = {"mcc": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}  # the others are as here
NOT_SHOWN = (*map(dashed, DATA_PATHS), "--model")  # options with paths
MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&$#@!]|:(?=//))")  # what starts or ends something within a line


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Args:
        name: on the hub, OWNER/NAME.
        config: the run's options.
        summary: what its summary.json holds.
        records: the lines of its metrics.jsonl.
        tasks: with their classes, and the heads and losses of the run.
        checkpoint: best or last.
        counts: by task, the number of examples of each split that is known.
        spread: mean and deviation of several runs by split, task and metric (`cross_validation.summarize`).
        spread_of: which runs these are; empty without any.
        base_model: the name on the hub of the model that was trained further.
        datasets: names of data sets on the hub.
        license: the hub's name of one.
    """

    name: str
    config: TrainConfig
    summary: Mapping[str, Any]
    records: Sequence[Record]
    tasks: Sequence[Task]
    checkpoint: str
    counts: Mapping[str, Mapping[str, int]]
    spread: Mapping[str, Any]
    spread_of: str
    base_model: str | None
    datasets: Sequence[str]
    license: str | None


@dataclass(frozen=True)
class ScoreRow:
    """A score of the checkpoint, and over several runs its mean and its standard deviation."""

    split: str
    task: str
    title: str
    metric: str  # empty for the overall score
    value: float
    mean: float | None = None
    deviation: float | None = None


def model_card(facts: CardFacts) -> str:
    """README.md: YAML metadata, and Markdown in which every text of the user's is escaped."""
    rows = list(score_rows(facts))
    body = (
        _environment()
        .get_template("model_card.md")
        .render(
            title=facts.name.split("/")[-1],
            name=Markup(facts.name),  # only in code
            version=facts.summary["versions"].get("minbert", ""),
            tasks=facts.tasks,
            counts=facts.counts,
            data=data(facts),
            chosen=chosen(facts),
            rows=rows,
            spread_of=facts.spread_of,
            method=", ".join(method(facts.config)),
            options=[
                each for each in options(facts.config) if each.value != each.default and each.name not in NOT_SHOWN
            ],
            conflicts=conflicts(facts.records),
            facts=training(facts),
        )
    )
    return f"---\n{metadata(facts, rows).to_yaml()}\n---\n\n{body}"


# The metadata -----------------------------------------------------------------------------------------------------


def metadata(facts: CardFacts, rows: Sequence[ScoreRow]) -> ModelCardData:
    """What the hub searches and shows: kind of model, origin, and the scores as its model-index."""
    kind = pipeline_tag(facts.tasks)
    data_set = facts.datasets[0] if len(facts.datasets) == 1 else None
    results = [
        EvalResult(
            task_type=kind,
            dataset_type=data_set or row.task,
            dataset_name=row.title,
            dataset_split=row.split,
            metric_type=HUB_METRICS.get(row.metric, row.metric),
            metric_value=row.value,
            metric_name=metric(row.metric),
        )
        for row in rows
        if row.metric
    ]
    return ModelCardData(
        library_name="minbert",
        pipeline_tag=kind,
        tags=["bert", *(["multitask"] if len(facts.tasks) > 1 else [])],
        base_model=facts.base_model,
        datasets=[*facts.datasets] or None,
        license=facts.license,
        model_name=facts.name.split("/")[-1],
        eval_results=results,
    )


def pipeline_tag(tasks: Sequence[Task]) -> str:
    """The hub's task: similarity of sentences where all tasks score pairs, else classification."""
    similarity = all(task.is_pair and task.is_regression for task in tasks)
    return "sentence-similarity" if similarity else "text-classification"


# The sections -----------------------------------------------------------------------------------------------------


def score_rows(facts: CardFacts) -> Iterator[ScoreRow]:
    """The scores of the checkpoint by split, task and metric; those of the last epoch are known on dev."""
    found = {name: facts.summary[name] for name in ("dev", "test") if name in facts.summary}
    if facts.checkpoint == "last":
        last = epochs(facts.records)[-1]
        found = {"dev": {**{task: dict(scores) for task, scores in last.metrics.items()}, "overall": last.overall}}
    titles = {task.name: task.title for task in facts.tasks}
    for split, scores in found.items():
        for task, value in scores.items():
            of_task = value if isinstance(value, Mapping) else {"": value}
            for name, number in of_task.items():
                several = facts.spread.get(split, {}).get(task, {})
                several = several.get(name, {}) if name else several
                yield ScoreRow(split, task, titles.get(task, task), name, number, **several)


def chosen(facts: CardFacts) -> str:
    """Which epoch the checkpoint is of."""
    scored = len(epochs(facts.records))
    if facts.checkpoint == "last":
        return f"Of the last epoch, {scored}"
    return f"Of epoch {facts.summary['best_epoch']} of {scored}, the best one by the overall score on dev"


def data(facts: CardFacts) -> str:
    """Where the data is from, as far as a reader of the card can know it."""
    config, own = facts.config, [facts.config.own_tasks.get(task.name) for task in facts.tasks]
    files = [each for each in (config.data, config.reviews) if each is not None and each not in facts.datasets]
    files += [task.name for task in own if task is not None and not str(task.train).startswith(HUB)]
    parts = [f"On the hub: {', '.join(facts.datasets)}"] if facts.datasets else []
    parts += ["Files of the author"] if files or config.augmented else []
    return "; ".join(parts) or "The demo corpus of minbert, which is generated"


def conflicts(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of each pair of tasks the share of steps in conflict and the mean cosine of their gradients."""
    rates, cosines = grid(records, "conflict_rate", 1), grid(records, "cosine", 1)
    cosine = dict(zip(cosines.names, (row[0] for row in cosines.values), strict=True))
    return [
        {"pair": pair, "rate": row[0], "cosine": cosine.get(pair)}
        for pair, row in zip(rates.names, rates.values, strict=True)
    ]


def training(facts: CardFacts) -> dict[str, str]:
    """How long it took, on what, with which versions."""
    summary = facts.summary
    memory = summary["peak_memory_bytes"]
    found = {
        "machine": summary["device"],
        "precision": summary["precision"],
        "time": duration(summary["seconds"]),
        "steps": whole(summary["steps"]),
        "examples per second": whole(summary["examples_per_second"]),
        "parameters": whole(summary["parameters"]),
        "peak memory": "" if memory is None else f"{memory / 1e9:.2f} GB",
        "seed": str(facts.config.seed),
        "fold": "" if facts.config.fold is None else f"{facts.config.fold} of {facts.config.folds}",
        "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    }
    return {name: text for name, text in found.items() if text}


# Markdown ---------------------------------------------------------------------------------------------------------


def markdown(text: object) -> str:
    """A text for Markdown, on one line, in which it means nothing but itself."""
    return MARKDOWN.sub(r"\\\1", one_line(str(text)))


def labels(task: Task) -> str:
    """The classes of a task, or its scale."""
    if task.is_regression:
        return "score from {:g} to {:g}".format(*task.scale)
    names = [shown(str(label), 60) for label in task.classes or ()]
    if task.class_names:
        names = [f"{label} ({shown(name, 60)})" for label, name in zip(names, task.class_names, strict=True)]
    rest = f", and {len(names) - MOST_LABELS} more" if len(names) > MOST_LABELS else ""
    return f"{', '.join(names[:MOST_LABELS])}{rest}"


def whole(number: float) -> str:
    """A whole number in groups of three digits: 12,345,678."""
    return f"{round(number):,}"


def mean_and_deviation(row: ScoreRow) -> str:
    return "–" if row.deviation is None else f"{score(row.mean)} ± {score(row.deviation)}"


def verbatim(text: str) -> Markup:
    """A text for a block of code: a task's name, which has letters, digits, - and _ alone."""
    return Markup(text)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        finalize=lambda value: value if isinstance(value, Markup) else markdown(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (whole, labels, mean_and_deviation, metric, option, percent, score, signed, verbatim):
        environment.filters[function.__name__] = function
    return environment
