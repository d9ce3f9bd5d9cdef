"""What a finished run came to: a record that outlives the run's directory, as table.json has one for each run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minbert.errors import UserError
from minbert.files.schema_checks import build, checked
from minbert.report.comparison_report import our_scores
from minbert.runs.epochs import epochs
from minbert.runs.resume import deciding
from minbert.runs.run_directory import Run


@dataclass(frozen=True)
class RunResult:
    """Scores, time and memory of a run, and what it was run with."""

    seed: int
    scores: dict[str, float]  # of the best epoch: "dev sst", further metrics as "dev sst f1", "test overall"
    steps: int
    steps_per_epoch: int
    examples: int  # seen in training
    seconds: float  # of all steps
    step_seconds: float  # median of those that were logged: what ran beside some of them does not count
    conflict_rate: float | None  # share of the steps and pairs whose gradients conflicted; None without a gradient each
    projected_share: float | None  # norm of what surgery changed, as a share of the update's: mean of the logged steps
    peak_memory_bytes: int | None
    device: str  # with threads, precision and torch's version
    processor: str | None  # None where an earlier minbert trained
    commit: str | None  # of minbert's source tree; None where it was installed without one
    options: dict[str, Any]  # `minbert.runs.resume.deciding`

    @property
    def machine(self) -> str:
        return f"{self.processor or 'unknown processor'}; {self.device}"

    @property
    def hours_per_epoch(self) -> float:
        return self.seconds / self.steps * self.steps_per_epoch / 3600

    @property
    def by_column(self) -> dict[str, float]:
        """The scores by the columns of a report of several runs: "sst" for dev, "sst test" for the test split."""
        return {
            name.removeprefix("dev ") if name.startswith("dev ") else f"{name.removeprefix('test ')} test": score
            for name, score in self.scores.items()
        }


def result_of(run: Run) -> RunResult:
    """What a finished run came to, from its directory.

    Raises:
        UserError: a file of it is damaged.
    """
    summary, config = run.summary(), run.config()
    single = [split for split in ("dev", "test") if len(summary.get(split, {})) <= 2]  # the overall is that of its task
    scores = {}
    for name, score in our_scores(run).items():
        split = "test" if name.endswith(" test") else "dev"
        name = name.removesuffix(" test")
        if name != "overall" or split not in single:
            scores[f"{split} {name}"] = score
    seconds, records = summary["seconds"], run.records()
    logged = [sum(record["seconds"].values()) for record in records if "seconds" in record]
    rates = [rate for epoch in epochs(records) for rate in epoch.conflict_rate.values()]
    shares = [share for record in records if (share := record.get("projected_share")) is not None]
    return RunResult(
        seed=config.seed,
        scores=scores,
        steps=summary["steps"],
        steps_per_epoch=summary["steps_per_epoch"],
        examples=summary["examples"],
        seconds=seconds,
        step_seconds=statistics.median(logged) if logged else seconds / summary["steps"],
        conflict_rate=statistics.mean(rates) if rates else None,
        projected_share=statistics.mean(shares) if shares else None,
        peak_memory_bytes=summary["peak_memory_bytes"],
        device=summary["device"],
        processor=summary.get("processor"),
        commit=summary["versions"].get("commit"),
        options=deciding(config),
    )


def read_results(row: Mapping[str, Any], where: str) -> dict[int, RunResult]:
    """The results under "runs" of a row of a file, by seed.

    Args:
        where: the start of an error message.

    Raises:
        UserError: one is no result, or two are of one seed.
    """
    results: dict[int, RunResult] = {}
    for values in checked(row.get("runs", []), list[dict[str, Any]], f"{where}: runs"):
        result = read_result(values, f"{where}: runs")
        if results.setdefault(result.seed, result) is not result:
            raise UserError(f"{where}: two runs of seed {result.seed}")
    return results


def read_result(values: Mapping[str, Any], where: str) -> RunResult:
    """The result of a record in a file.

    Args:
        where: the start of an error message.

    Raises:
        UserError: it is no such record.
    """
    result = build(RunResult, values, where)
    for name in result.scores:
        if name.partition(" ")[0] not in ("dev", "test"):
            raise UserError(f"{where}: expected scores of dev or test, got {name!r}")
    if min(result.steps, result.steps_per_epoch) < 1 or min(result.seconds, result.step_seconds) <= 0:
        raise UserError(f"{where}: expected steps and seconds of more than 0")
    return result
