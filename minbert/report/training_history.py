"""The records of metrics.jsonl as curves, grids and phases; and the options of a run, beside their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from minbert.config import TrainConfig
from minbert.errors import dashed
from minbert.runs.resume import flat

Record = dict[str, Any]
Item = TypeVar("Item")
Points = list[tuple[float, float]]  # (step or epoch, value)


def curves(records: Sequence[Record], key: str, limit: int = 120) -> dict[str, Points]:
    """The values of `key` by step, by name (by the key itself if it is one number), each of `limit` points at most.

    Values that were not finite are left out.
    """
    found: dict[str, Points] = {}
    for record in records:
        value = record.get(key)
        for name, number in value.items() if isinstance(value, dict) else [(key, value)]:
            if isinstance(number, int | float):
                found.setdefault(name, []).append((record["step"], number))
    return {name: thinned(points, limit) for name, points in found.items()}


def thinned(points: Points, limit: int) -> Points:
    """At most `limit` points: the means of as many neighbours each, or one more."""
    parts = _parts(points, limit)
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _parts(items: Sequence[Item], limit: int) -> list[Sequence[Item]]:
    """The items in at most `limit` parts of neighbours, as equal as can be."""
    count = min(limit, len(items))
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]


@dataclass(frozen=True)
class Grid:
    """A measure of pairs of tasks over the steps.

    Attributes:
        spans: first and last step of each column.
        values: a row for each pair, a column for each span; None where there is none.
    """

    names: list[str]
    spans: list[tuple[int, int]]
    values: list[list[float | None]]

    @property
    def largest(self) -> float:
        """The largest absolute value; 0 without any."""
        return max((abs(value) for row in self.values for value in row if value is not None), default=0.0)


def grid(records: Sequence[Record], key: str, columns: int = 60) -> Grid:
    """The means of `key` for each pair of tasks over spans of steps, at most `columns` of them."""
    having = [record for record in records if key in record]
    names = list(dict.fromkeys(name for record in having for name in record[key]))
    parts = _parts(having, columns)
    values = [[_mean([record[key].get(name) for record in part]) for part in parts] for name in names]
    return Grid(names, [(part[0]["step"], part[-1]["step"]) for part in parts], values)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Phase:
    """A phase of the training step."""

    name: str
    seconds: float  # of a step, in the mean
    share: float  # of all phases


def phases(records: Sequence[Record]) -> list[Phase]:
    """Where a step's time went, by the steps that were logged."""
    steps = [record["seconds"] for record in records if "seconds" in record]
    names = dict.fromkeys(name for seconds in steps for name in seconds)
    means = {name: sum(seconds.get(name, 0.0) for seconds in steps) / len(steps) for name in names}
    total = sum(means.values())
    return [Phase(name, mean, mean / total if total else 0.0) for name, mean in means.items()]


@dataclass(frozen=True)
class Option:
    """An option of a run: its name on the command line, its value and its default."""

    name: str
    value: Any
    default: Any

    @property
    def changed(self) -> bool:
        return self.value != self.default and not self.resolved

    @property
    def resolved(self) -> bool:
        """Whether the default is None or auto, and the value was given or chosen by the run."""
        return self.default in (None, "auto") and self.value != self.default


def options(config: TrainConfig) -> list[Option]:
    """All options but the run directory's: first those that differ from the defaults, then the resolved ones."""
    defaults = dict(flat(TrainConfig()))
    found = [
        Option(dashed(name), value, defaults[name]) for name, value in flat(config) if name not in ("out", "resume")
    ]
    return sorted(found, key=lambda option: (not option.changed, not option.resolved))
