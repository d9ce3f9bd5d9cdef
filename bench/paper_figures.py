"""Figures of what the rows of the papers' tables gain: of one paper, and of all."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import save
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from paper_comparisons import COMPARED_WITH, Comparison, minutes
from training_runs import with_deviation

PUBLISHED, OURS = "#c45a00", "tab:blue"


def draw_paper(path: Path, compared: Sequence[Comparison]) -> None:
    """A line for each row: what it gains, published and ours, and both numbers beside it."""
    figure = Figure(figsize=(10, 1 + 0.55 * len(compared)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.5", linewidth=1)

    def write(text: str, x: float, y: float, points: float, colour: str, align: str = "left", up: float = 0) -> None:
        """Text some points to the right of the axes, or with `x` 0 to the left of them, in the line of a row."""
        at_row = axes.get_yaxis_transform()
        drawn = axes.annotate(text, (x, y), (points, up), xycoords=at_row, textcoords="offset points", fontsize=9)
        drawn.set(color=colour, ha=align, va="center")

    for y, each in enumerate(compared):
        if y % 2:
            axes.axhspan(y - 0.5, y + 0.5, color="0.96", zorder=0)
        spread = statistics.stdev(each.gains) if len(each.gains) > 1 else None
        ours = statistics.mean(each.gains) if each.gains else None
        for place, colour, value, error in ((-0.15, PUBLISHED, each.published, None), (0.15, OURS, ours, spread)):
            if value is not None:
                axes.errorbar(value, y + place, xerr=error, fmt="o", color=colour, markersize=5, capsize=3)
        title = textwrap.wrap(each.row.row.title, 57)
        write("\n".join([*title, ""]), 0, y, -8, "black", "right")
        write(
            "\n".join([*([""] * len(title)), f"{each.row.row.name} less {each.base.row.name}"]),
            0,
            y,
            -8,
            "0.45",
            "right",
        )
        write("–" if each.published is None else f"{each.published:+.3f}", 1, y, 8, PUBLISHED)
        write(with_deviation(each.gains, digits=3, sign="+") if each.gains else "–", 1, y, 68, OURS)
    write("published", 1, -0.5, 8, PUBLISHED, up=10)
    write("ours", 1, -0.5, 68, OURS, up=10)
    axes.set_yticks([])
    axes.set_ylim(len(compared) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("difference of the overall scores on dev", fontsize=9)
    save(figure, path)


def draw_across(path: Path, compared: Sequence[Comparison]) -> None:
    """A point for each row, its minutes and its gain; the most and the least gain of each paper are named."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="0.5", linewidth=1)
    points, names = [], []
    for index, number in enumerate(COMPARED_WITH):
        colour = f"C{index}"
        mine = [each for each in compared if each.paper.number == number]
        if not mine:
            continue
        places = [(statistics.mean(each.minutes), statistics.mean(each.gains)) for each in mine]
        axes.plot(*zip(*places, strict=True), "o", color=colour, markersize=6, label=number)
        rows = [each.row for each in mine]
        bases = {statistics.mean(minutes(base) for _, base, _ in each.pairs) for each in mine if each.base not in rows}
        axes.plot([*bases], [0] * len(bases), "o", color=colour, markersize=6, fillstyle="none")
        points += [*places, *((minutes, 0.0) for minutes in bases)]
        by_gain = sorted(range(len(mine)), key=lambda at: places[at][1])
        names += [(places[at], mine[at].recipe, colour) for at in dict.fromkeys((by_gain[-1], by_gain[0]))]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("minutes of training (hollow: a row that others are compared with)", fontsize=9)
    axes.set_ylabel("gain in the overall score on dev", fontsize=9)
    axes.margins(0.1)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="paper", fontsize=9, title_fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # places the axes
    place_names(axes, points, names)
    save(figure, path)


def place_names(
    axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[tuple[tuple[float, float], str, str]]
) -> None:
    """Write each name beside its point, where it is least in the way of points and of earlier names."""
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(points)]
    inside = axes.get_window_extent()
    offsets = [(dx, dy) for dy in (0, 14, -14, 28, -28, 42, -42) for dx in (10, -10)]
    for place, name, colour in names:
        text = axes.annotate(name, place, offsets[0], textcoords="offset points", va="center", fontsize=9, color=colour)

        def covered(offset: tuple[float, float], text: Any = text) -> int:
            text.set_position(offset)
            text.set_ha("left" if offset[0] > 0 else "right")
            box = text.get_window_extent()
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            return sum(box.overlaps(other) for other in taken) + 100 * outside

        offset = min(offsets, key=covered)
        covered(offset)
        taken.append(text.get_window_extent())
        if offset[1]:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 3}
            axes.annotate("", place, offset, textcoords="offset points", arrowprops=line)
