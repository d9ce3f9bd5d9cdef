"""Named options: NAME.yaml here; the rows of the papers' tables, papers/PAPER.yaml; protocols/NAME.yaml for these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minbert.errors import UserError, did_you_mean, require_known

FOLDER = Path(__file__).parent
PAPERS_TASKS = ("sst", "qqp", "sts")
Scores = Mapping[str, Mapping[str, float]]  # split -> task or "overall" -> score


@dataclass(frozen=True)
class Row:
    """A system in a paper's table."""

    name: str
    title: str  # as the table calls it
    published: Scores
    options: Mapping[str, Any]  # of `minbert train`
    hours: float | None = None  # published, of an epoch
    needs: Sequence[str] = ()  # options that name the user's own files


@dataclass(frozen=True)
class Paper:
    """A paper's tables. The file's first lines name the authors, and what was chosen where the paper is silent."""

    number: str
    title: str
    rows: Mapping[str, Row]

    def row(self, name: str) -> Row:
        """The row of this name.

        Raises:
            UserError: the paper has no such row.
        """
        if name not in self.rows:
            near = did_you_mean(name, list(self.rows))
            raise UserError(f"paper {self.number} has no row {name!r}{near}; rows: {', '.join(self.rows)}")
        return self.rows[name]


@dataclass(frozen=True)
class Protocol:
    """What all rows of the papers' tables are trained with, in place of the paper's length, batch sizes and rates.

    A row keeps what it is about: its tasks and the proportions of their batches, `epoch_times`, further examples.
    """

    name: str
    title: str
    examples: int  # of the papers' three tasks together in a step of each; a row's batch sizes are scaled to it
    batches: int  # of each task in an epoch
    epochs: int
    rates: Mapping[str, float]  # peak learning rate by family: `family`

    def options(self, row: Row) -> dict[str, Any]:
        """The options of `minbert train` that take the place of the row's."""
        sizes = row.options["batch_size"]
        by_task = sizes if isinstance(sizes, Mapping) else dict.fromkeys(PAPERS_TASKS, sizes)
        factor = self.examples / sum(by_task[task] for task in PAPERS_TASKS)
        scaled = {task: max(1, round(size * factor)) for task, size in by_task.items()}
        return {
            "epochs": self.epochs,
            "epoch_length": self.batches,
            "batch_size": scaled if isinstance(sizes, Mapping) else scaled[PAPERS_TASKS[0]],
            "lr": self.rates[family(row)],
        }


def family(row: Row) -> str:
    """Which of a protocol's rates a row has: frozen encoder, a step of all tasks (joint) or of one (in-turn)."""
    if row.options.get("mode") == "pretrain":
        return "frozen"
    return "joint" if row.options.get("sampling", "joint") == "joint" else "in-turn"


def protocols() -> list[str]:
    """The protocols' names."""
    return sorted(path.stem for path in (FOLDER / "protocols").glob("*.yaml"))


def protocol(name: str) -> Protocol:
    """A protocol for the papers' tables.

    Raises:
        UserError: there is none of that name.
    """
    require_known("unknown protocol", name, protocols())
    content = yaml.safe_load((FOLDER / "protocols" / f"{name}.yaml").read_text(encoding="utf-8"))
    return Protocol(name=name, **content)


def papers() -> list[str]:
    """The papers' numbers."""
    return sorted(path.stem for path in (FOLDER / "papers").glob("*.yaml"))


def paper(number: str) -> Paper:
    """A paper's rows.

    Raises:
        UserError: there is no paper of that number.
    """
    require_known("unknown paper", number, papers())
    content = yaml.safe_load((FOLDER / "papers" / f"{number}.yaml").read_text(encoding="utf-8"))
    rows = {
        name: Row(
            name,
            row["title"],
            row.get("published", {}),
            {**content["common"], **row.get("options", {})},
            row.get("hours"),
            row.get("needs", ()),
        )
        for name, row in content["rows"].items()
    }
    return Paper(number, content["title"], rows)


def recipe(name: str) -> Mapping[str, Any]:
    """The options of a recipe: `NAME`, or `PAPER/ROW`, such as 000/smart.

    Raises:
        UserError: there is no recipe of that name.
    """
    number, _, row = name.partition("/")
    if row:
        return paper(number).row(row).options
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in known:
        listed = f"{', '.join(known)}, and PAPER/ROW of the papers {', '.join(papers())}"
        raise UserError(f"unknown recipe {name!r}{did_you_mean(name, known)}; known: {listed}")
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) or {}
