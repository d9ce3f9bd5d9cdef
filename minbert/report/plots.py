"""Pictures of a run, from its metrics.jsonl, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minbert.runs.run_directory import Run

Record = dict[str, Any]


def plot_run(run: Run) -> list[Path]:
    """Draw what the run has records for.

    Returns:
        plots/curves.png (losses, SMART's regulariser, dev scores), plots/timing.png (seconds of a step by phase) and,
        for runs with a gradient of each task, plots/conflicts.png (cosine of each pair of them over the steps).
    """
    records = run.records()
    steps = [record for record in records if "loss" in record]
    pictures = {"curves": (_curves, records), "timing": (_timing, steps)}
    conflicting = [record for record in steps if "cosine" in record]
    if conflicting:
        pictures["conflicts"] = (_conflicts, conflicting)
    return [_draw(run.path / "plots" / f"{name}.png", *picture) for name, picture in pictures.items()]


def _draw(path: Path, picture: Callable[[Any, Sequence[Record]], None], records: Sequence[Record]) -> Path:
    from matplotlib.figure import Figure  # whose own canvas needs no backend to be chosen for the process

    figure = Figure(layout="constrained")
    picture(figure, records)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _curves(figure: Any, records: Sequence[Record]) -> None:
    steps = [record for record in records if "loss" in record]
    measures = {"loss": "training loss", "smart": "SMART's regulariser"}
    measures = {key: label for key, label in measures.items() if any(key in record for record in steps)}
    figure.set_size_inches(5.5 * (len(measures) + 1), 4)
    *panels, scores = figure.subplots(1, len(measures) + 1, squeeze=False)[0]
    for axes, (key, label) in zip(panels, measures.items(), strict=True):
        for name in _names(steps, key):
            points = [(record["step"], record[key][name]) for record in steps if name in record.get(key, {})]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set(xlabel="step", ylabel=label)
    evaluated = [record for record in records if "dev" in record]
    for name in _names(evaluated, "dev"):
        values = [record["dev"][name] for record in evaluated]
        values = [next(iter(value.values())) if isinstance(value, dict) else value for value in values]
        scores.plot([record["epoch"] for record in evaluated], values, label=name, marker="o")
    scores.set(xlabel="epoch", ylabel="dev score")
    for axes in (*panels, scores):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()


def _timing(figure: Any, steps: Sequence[Record]) -> None:
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    phases = _names(steps, "seconds")
    seconds = [[record.get("seconds", {}).get(phase, 0.0) for record in steps] for phase in phases]
    axes.stackplot([record["step"] for record in steps], seconds, labels=phases, alpha=0.8)
    axes.set(xlabel="step", ylabel="seconds of the step")
    if phases:
        axes.legend(loc="upper right")


def _conflicts(figure: Any, steps: Sequence[Record]) -> None:
    pairs = _names(steps, "cosine")
    figure.set_size_inches(8, 1.5 + 0.5 * len(pairs))
    axes = figure.subplots()
    cosines = [[_number(record["cosine"].get(pair)) for record in steps] for pair in pairs]
    first, last = steps[0]["step"], steps[-1]["step"]
    extent = (first, max(last, first + 1), len(pairs) - 0.5, -0.5)
    image = axes.imshow(cosines, aspect="auto", cmap="coolwarm_r", vmin=-1, vmax=1, interpolation="none", extent=extent)
    axes.set(xlabel="step", yticks=range(len(pairs)), yticklabels=pairs)
    figure.colorbar(image, label="cosine (red: conflict)")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _names(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.get(key, {})))
