"""What the rows of the papers' tables gain over the row that their paper compares them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from minbert.errors import UserError
from minbert.recipes import Paper, paper
from minbert.report.paper_table import RowResult, read_table
from minbert.report.run_result import RunResult
from minbert.tasks import TASKS
from minbert.tasks.metrics import overall

COMPARED_TASKS = ("sst", "qqp", "sts")
# By paper: rows, of which the first pattern that fits counts, and the row that the paper compares them with.
COMPARED_WITH: Mapping[str, Mapping[str, str]] = {
    "000": {"*": "finetune"},
    # Sections 5.4.2 and 6.2 compare at the same dropout; the two rows of section 5.5 have 0.3.
    "001": {"finetune-mix-0.5": "finetune-mix-0.3", "*-0.5": "finetune-mix-0.5", "*": "finetune-mix-0.3"},
    # Section 7 measures E against A ("refer to A"); the legend and section 5.4 have F, G and H as changes of E.
    "002": {
        "[fgh]-finetune": "e-finetune",
        "[fgh]-pretrain": "e-pretrain",
        "*-finetune": "a-finetune",
        "*-pretrain": "a-pretrain",
    },
    # Section 4.4: shuffled for sequential batches, SMART on or off, and two changes of row 3. Row 4 has no SMART.
    "003": {"1": "2", "[56]": "3", "*": "4"},
    # Section 5.3: extension 2 is built on GSE, mean pooling on its best row, extension 4 on the rows that it prolongs.
    "004": {
        "cosine-2d1-*": "cosine-2d1",
        "smart-3x": "smart",
        "smart-gse": "gse",
        "gse-3x": "gse",
        "cosine-*": "gse",
        "surgery": "multitask",
        "gse": "multitask",
        "*": "baseline",
    },
}


@dataclass(frozen=True)
class Comparison:
    """A row beside the one that its paper compares it with: differences of their overall scores on dev."""

    paper: Paper
    row: RowResult
    base: RowResult
    published: float | None
    pairs: Sequence[
        tuple[RunResult, RunResult, float]
    ]  # of each seed that both rows have: its run, the other's, and what it gains

    @property
    def recipe(self) -> str:
        return f"{self.paper.number}/{self.row.row.name}"

    @property
    def gains(self) -> list[float]:
        """Ours, by seed."""
        return [gain for *_, gain in self.pairs]

    @property
    def minutes(self) -> list[float]:
        """Of the row's runs, by seed."""
        return [minutes(run) for run, *_ in self.pairs]

    @property
    def minutes_more(self) -> list[float] | None:
        """By seed; None where a pair ran on two machines."""
        if any(run.machine != base.machine for run, base, _ in self.pairs):
            return None
        return [minutes(run) - minutes(base) for run, base, _ in self.pairs]


@dataclass(frozen=True)
class Table:
    """A paper and the rows of its table.json."""

    paper: Paper
    rows: Mapping[str, RowResult]

    def compared(self) -> list[Comparison]:
        """The rows that have an overall score, published or ours, and so has the row that they are compared with."""
        found = []
        for name, row in self.rows.items():
            base = self.rows.get(compared_with(self.paper.number, name), row)
            if base is row:
                continue
            others = base.counted
            pairs = [
                (run, others[run.seed], gain)
                for run in row.counted.values()
                if run.seed in others and (gain := difference(run.scores, others[run.seed].scores)) is not None
            ]
            published = difference(row.published(), base.published())
            if published is not None or pairs:
                found.append(Comparison(self.paper, row, base, published, pairs))
        return found


def compared_with(number: str, row: str) -> str:
    """The row that a paper compares a row with; that row itself where it is compared with none."""
    return next(base for pattern, base in COMPARED_WITH[number].items() if fnmatch(row, pattern))


def difference(scores: Mapping[str, float], others: Mapping[str, float]) -> float | None:
    """Of the overall scores; None where one has none."""
    first, second = overall_of(scores), overall_of(others)
    return None if first is None or second is None else first - second


def overall_of(scores: Mapping[str, float]) -> float | None:
    """The overall score on dev as a run has it, from those of sst, qqp and sts; None where one is missing.

    Not the paper's own: 001 takes the mean of the three as they are.
    """
    of_tasks = {name: {TASKS[name].metric: scores[f"dev {name}"]} for name in COMPARED_TASKS if f"dev {name}" in scores}
    return overall(of_tasks, TASKS.values()) if len(of_tasks) == len(COMPARED_TASKS) else None


def read_tables(directory: Path) -> list[Table]:
    """The tables of a directory.

    Raises:
        UserError: there is none, one is damaged, or there is no paper or row of a name.
    """
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise UserError(f"no tables in {directory}: copy the table.json of `minbert reproduce 000` there as 000.json")
    return [Table(found, read_table(path, found)) for path in paths for found in [paper(path.stem)]]


def minutes(run: RunResult) -> float:
    """Of all steps, from the median one: what ran beside some of them does not count."""
    return run.steps * run.step_seconds / 60
