"""Named options: NAME.yaml here, and the rows of the papers' tables, papers/PAPER.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minbert.errors import UserError, did_you_mean, require_known

FOLDER = Path(__file__).parent
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
