"""The charts of how a run went, from its metrics.jsonl: SVG figures for its report, and PNG files in plots/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from minbert.files.atomic import write_atomically
from minbert.report.svg_charts import Figure, heat_map, line_chart
from minbert.report.training_history import Points, Record, curves, grid
from minbert.runs.epochs import epochs
from minbert.runs.run_directory import Run

SERIES = 6  # colours that the style sheet has for lines


def palette(names: Sequence[str]) -> dict[str, str]:
    """The class of each task's colour."""
    return {name: f"s{number % SERIES}" for number, name in enumerate(names)}


def score_curves(records: Sequence[Record]) -> dict[str, Points]:
    """Dev scores by epoch, of each task and overall."""
    scored = epochs(records)
    names = scored[0].scores if scored else ()
    lines = {name: [(float(each.epoch), each.scores[name]) for each in scored if name in each.scores] for name in names}
    return {**lines, "overall": [(float(each.epoch), each.overall) for each in scored]} if scored else {}


# SVG ---------------------------------------------------------------------------------------------------------------


def training_figures(records: Sequence[Record], colours: Mapping[str, str]) -> list[Figure]:
    """Dev scores by epoch, and the training loss of each task by step."""
    scores = score_curves(records)
    figures = [line_chart("Dev scores", scores, "epoch", {**colours, "overall": "ink"}, marked=True)] if scores else []
    for name, points in curves(records, "loss").items():
        figures.append(line_chart(f"Training loss, {name}", {name: points}, "step", colours))
    return figures


def gradient_figures(records: Sequence[Record], colours: Mapping[str, str]) -> dict[str, list[Figure]]:
    """Figures of surgery (conflicts and what it removes) and of the regularisers; none of what the run did not do."""

    def lines(key: str, title: str, note: str) -> list[Figure]:
        found = curves(records, key)
        return [line_chart(title, found, "step", {**colours, key: "s0"}, note=note)] if found else []

    surgery: list[Figure] = []
    cosine, similarity = (grid(records, key) for key in ("cosine", "magnitude_similarity"))
    if cosine.names and similarity.names:
        note = "Cosine of two tasks' gradients; below 0 they conflict."
        surgery.append(heat_map("Conflict", cosine, signed=True, note=note))
        note = "2|a||b| / (|a|² + |b|²): 1 for gradients of one length, near 0 where one dominates."
        surgery.append(heat_map("Magnitude similarity", similarity, signed=False, note=note))
    surgery += lines("projected_share", "Projected share", "How much of the plain update surgery changes.")
    surgery += lines("weights", "Weights", "What each task's gradient is multiplied by, before clipping.")
    note = "The divergence of perturbed from clean outputs, or what FreeLB's search adds to the loss, before lambda_s."
    regularisers = lines("smart", "SMART's regulariser", note)
    note = "Below 1e-4 the regulariser does next to nothing."
    regularisers += lines("smart_share", "SMART's share of the loss", note)
    regularisers += lines("rdrop", "R-Drop's divergence", "Of the outputs under two dropout masks, before alpha.")
    regularisers += lines("bregman", "Bregman divergence", "From the EMA teacher's outputs, before mu.")
    return {"Gradient surgery": surgery, "Regularisers": regularisers}


# PNG ---------------------------------------------------------------------------------------------------------------


def plot_run(run: Run) -> list[Path]:
    """Draw what the run has records for.

    Returns:
        plots/curves.png (losses, SMART's regulariser, dev scores), plots/timing.png (seconds of a step by phase) and,
        for runs with a gradient of each task, plots/conflicts.png (cosine of each pair of them over the steps).
    """
    from matplotlib.figure import Figure as Picture  # its own canvas needs no backend for the whole process

    records = run.metrics.records()
    drawings = {"curves": _draw_curves, "timing": _draw_timing, "conflicts": _draw_conflicts}
    if not any("cosine" in record for record in records):
        del drawings["conflicts"]
    paths = []
    for name, draw in drawings.items():
        picture = Picture(layout="constrained")
        draw(picture, records)
        paths.append(run.path / "plots" / f"{name}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        drawn = BytesIO()
        picture.savefig(drawn, dpi=130)
        write_atomically(paths[-1], drawn.getvalue())
    return paths


def _draw_curves(picture: Any, records: Sequence[Record]) -> None:
    panels = {"training loss": curves(records, "loss"), "SMART's regulariser": curves(records, "smart")}
    panels = {label: lines for label, lines in panels.items() if lines} | {"dev score": score_curves(records)}
    picture.set_size_inches(5.5 * len(panels), 4)
    for axes, (label, lines) in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        scores = label == "dev score"
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker="o" if scores else "")
        axes.set(xlabel="epoch" if scores else "step", ylabel=label)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend()


def _draw_timing(picture: Any, records: Sequence[Record]) -> None:
    steps = [record for record in records if "loss" in record]
    phases = list(dict.fromkeys(name for record in steps for name in record.get("seconds", {})))
    seconds = [[record.get("seconds", {}).get(phase, 0.0) for record in steps] for phase in phases]
    picture.set_size_inches(7, 4)
    axes = picture.subplots()
    axes.stackplot([record["step"] for record in steps], seconds, labels=phases, alpha=0.8)
    axes.set(xlabel="step", ylabel="seconds of the step")
    if phases:
        axes.legend(loc="upper right")


def _draw_conflicts(picture: Any, records: Sequence[Record]) -> None:
    cosine = grid(records, "cosine", columns=len(records))
    values = np.array(cosine.values, float)  # NaN for None
    (first, _), (_, last) = cosine.spans[0], cosine.spans[-1]
    rows = len(cosine.names)
    picture.set_size_inches(8, 1.5 + 0.5 * rows)
    axes = picture.subplots()
    extent = (first, max(last, first + 1), rows - 0.5, -0.5)
    image = axes.imshow(values, aspect="auto", cmap="coolwarm_r", vmin=-1, vmax=1, interpolation="none", extent=extent)
    axes.set(xlabel="step", yticks=range(rows), yticklabels=cosine.names)
    picture.colorbar(image, label="cosine (red: conflict)")
