"""Figures as inline SVG. Colours are classes, which the page's style sheet gives meaning in light and in dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
from markupsafe import Markup

from minbert.report.training_history import Grid, Points

WIDTH, HEIGHT = 420.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 34.0  # margins around what is drawn
SCATTERED = 2000  # points of a scatter plot at most
NAMED = 30  # classes that a confusion map names
CELLS = 4000  # cells of a confusion map at most


@dataclass(frozen=True)
class Figure:
    """A chart with its title, its legend (classes of colours and names) and a note."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""


def line_chart(
    title: str, lines: Mapping[str, Points], x: str, colours: Mapping[str, str], *, marked: bool = False, note: str = ""
) -> Figure:
    """Lines over steps or epochs.

    Args:
        x: what the horizontal axis counts.
        colours: the class of each line's colour.
        marked: whether each point gets a dot.
    """
    every = [point for points in lines.values() for point in points]
    axes = Axes(_span([point[0] for point in every]), _span([point[1] for point in every]))
    summary = "; ".join(f"{name} goes from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in lines.items())
    svg = _svg(f"{title}, by {x}: {summary}.", WIDTH, HEIGHT)
    axes.draw(svg, x, whole=True)
    of = {name: colours.get(name, "ink") for name in lines}
    for name, points in lines.items():
        positions = [(axes.across(px), axes.up(py)) for px, py in points]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in positions)
        SubElement(svg, "path", {"class": f"line {of[name]}", "d": path})
        if marked or len(positions) == 1:
            for (px, py), point in zip(positions, points, strict=True):
                dot = SubElement(svg, "circle", {"class": f"dot {of[name]}", **_xy(px, py, "c"), "r": "3.5"})
                SubElement(dot, "title").text = f"{name}, {x} {point[0]:g}: {point[1]:.3f}"
    return Figure(title, _markup(svg), [(of[name], name) for name in lines], note)


def heat_map(title: str, grid: Grid, *, signed: bool, note: str = "") -> Figure:
    """Pairs of tasks by steps: colour for the sign, strength for the size, full at 1 or at the largest if `signed`."""
    full = (grid.largest or 1.0) if signed else 1.0
    row, left = 26.0, 8 + 6.4 * max(len(name) for name in grid.names)
    bottom = TOP + row * len(grid.names)
    known = {name: [v for v in values if v is not None] for name, values in zip(grid.names, grid.values, strict=True)}
    means = "; ".join(f"{name} {sum(values) / len(values):.2f} in the mean" for name, values in known.items() if values)
    svg = _svg(f"{title} over the steps: {means}.", WIDTH, bottom + 24)
    width = (WIDTH - left - RIGHT) / len(grid.spans)
    for number, (name, values) in enumerate(zip(grid.names, grid.values, strict=True)):
        y = TOP + row * number
        _text(svg, left - 6, y + row / 2, name, "end")
        for column, (value, (first, last)) in enumerate(zip(values, grid.spans, strict=True)):
            if value is None:
                continue
            colour = "conflict" if value < 0 else "agree"
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            position = {**_xy(left + width * column, y + 1), "width": f"{width + 0.3:.1f}", "height": f"{row - 2:.1f}"}
            cell = SubElement(svg, "rect", {"class": colour, **position, "fill-opacity": f"{abs(value) / full:.3f}"})
            SubElement(cell, "title").text = f"{name}, {steps}: {value:.3f}"
    _text(svg, left, bottom + 13, str(grid.spans[0][0]), "start", "tick")
    _text(svg, WIDTH - RIGHT, bottom + 13, str(grid.spans[-1][1]), "end", "tick")
    _text(svg, (left + WIDTH - RIGHT) / 2, bottom + 13, "step", "middle", "label")
    blue, red = ("agree", f"up to {full:.2f}"), ("conflict", f"conflict, down to −{full:.2f}")
    return Figure(title, _markup(svg), [red, blue] if signed else [("agree", "full at 1")], note)


def confusion_map(title: str, counts: np.ndarray, names: Sequence[str], note: str = "") -> Figure:
    """A confusion matrix of many classes: the darker a cell, the larger its share of the true class (row).

    Of more than `CELLS` cells that are not 0, those with the most examples are drawn, and the note says so.

    Args:
        counts: by true class (row) and predicted class (column), [C, C].
        names: of the classes; up to `NAMED` classes are named beside their rows, more are numbered from 1.
    """
    count = len(names)
    named = count <= NAMED
    size = 340.0 if named else 440.0  # the names have their room beside it
    cell = size / count
    left = 8 + 6.4 * max(map(len, names)) if named else 34.0
    right = int(np.trace(counts))
    label = f"{title}: of {counts.sum()} examples of {count} classes {right} are on the diagonal."
    svg = _svg(label, left + size + RIGHT, TOP + size + BOTTOM)
    frame = {**_xy(left, TOP), "width": f"{size:g}", "height": f"{size:g}"}
    SubElement(svg, "rect", {"class": "frame", **frame})
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cells = np.argwhere(counts)
    if len(cells) > CELLS:
        note += f" Of {len(cells)} cells the {CELLS} with the most examples are drawn."
        cells = cells[np.argsort(-counts[counts > 0], kind="stable")[:CELLS]]
    for true, predicted in cells:
        colour = "agree" if true == predicted else "conflict"
        x, y = left + cell * predicted, TOP + cell * true
        position = {**_xy(x, y), "width": f"{cell + 0.1:.1f}", "height": f"{cell + 0.1:.1f}"}
        opacity = f"{0.15 + 0.85 * shares[true, predicted]:.2f}"
        rect = SubElement(svg, "rect", {"class": colour, **position, "fill-opacity": opacity})
        found = f"{names[true]} predicted as {names[predicted]}: {counts[true, predicted]}"
        SubElement(rect, "title").text = f"{found} ({shares[true, predicted]:.0%})"
    for number in range(count) if named else range(9, count, 10):
        middle = cell * (number + 0.5)
        _text(
            svg, left - 6, TOP + middle, names[number] if named else str(number + 1), "end", "name" if named else "tick"
        )
        if not named:
            _text(svg, left + middle, TOP + size + 12, str(number + 1), "middle", "tick")
    _text(svg, left + size / 2, TOP + size + 26, "predicted, in the same order", "middle", "label")
    return Figure(title, _markup(svg), [("agree", "right"), ("conflict", "wrong")], note)


def scatter(title: str, points: Points, scale: tuple[float, float], note: str = "") -> Figure:
    """Predicted (vertical) against true (horizontal) values of `scale`, with the line on which they are equal."""
    shown = points[:: -(-len(points) // SCATTERED)]
    low, high = scale
    axes = Axes((low, high), _span([low, high, *(predicted for _, predicted in points)]), 340.0)
    svg = _svg(f"{title}: {len(points)} points. {note}", WIDTH, axes.height)
    axes.draw(svg, "true")
    equal = f"M{axes.across(low):.1f} {axes.up(low):.1f}L{axes.across(high):.1f} {axes.up(high):.1f}"
    SubElement(svg, "path", {"class": "guide", "d": equal})
    cloud = SubElement(svg, "g", {"class": "cloud"})
    for true, predicted in shown:
        SubElement(cloud, "circle", {**_xy(axes.across(true), axes.up(predicted), "c"), "r": "3"})
    return Figure(title, _markup(svg), (), note)


# Drawing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """Where values lie in a picture: the smallest and largest of each axis, and the picture's height."""

    xs: tuple[float, float]
    ys: tuple[float, float]
    height: float = HEIGHT

    def across(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (self.height - BOTTOM - TOP)

    def draw(self, svg: Element, x: str, whole: bool = False) -> None:
        """Horizontal lines, ticks, and the name of the horizontal axis, whose ticks may have to be whole numbers."""
        for tick, shown in _ticks(*self.ys):
            SubElement(svg, "path", {"class": "grid", "d": f"M{LEFT:g} {self.up(tick):.1f}H{WIDTH - RIGHT:g}"})
            _text(svg, LEFT - 6, self.up(tick), shown, "end", "tick")
        for tick, shown in _ticks(*self.xs, whole=whole):
            across = min(self.across(tick), WIDTH - 2 - 3.2 * len(shown))  # within the picture
            _text(svg, across, self.height - BOTTOM + 14, shown, "middle", "tick")
        _text(svg, (LEFT + WIDTH - RIGHT) / 2, self.height - 6, x, "middle", "label")


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value, widened if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _ticks(low: float, high: float, whole: bool = False) -> list[tuple[float, str]]:
    """A few round numbers between them, and how they are written: with as many decimals as the one that needs most."""
    from matplotlib.ticker import MaxNLocator

    ticks = [
        float(tick)
        for tick in MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
        if low <= tick <= high
    ]
    plain = [f"{tick:.6g}" for tick in ticks]
    decimals = max((len(text.partition(".")[2]) for text in plain), default=0)
    small = any("e" in text for text in plain)
    return list(zip(ticks, plain if small else [f"{tick:.{decimals}f}" for tick in ticks], strict=True))


def _svg(label: str, width: float, height: float) -> Element:
    box = f"0 0 {width:g} {height:g}"
    return Element("svg", {"viewBox": box, "role": "img", "aria-label": label})


def _text(svg: Element, x: float, y: float, text: str, anchor: str, kind: str = "name") -> None:
    position = {**_xy(x, y), "text-anchor": anchor, "dominant-baseline": "middle"}
    SubElement(svg, "text", {"class": kind, **position}).text = text


def _xy(x: float, y: float, prefix: str = "") -> dict[str, str]:
    return {f"{prefix}x": f"{x:.1f}", f"{prefix}y": f"{y:.1f}"}


def _markup(svg: Element) -> Markup:
    return Markup(tostring(svg, encoding="unicode"))
