"""A run that is trained in a separate process, unless it has finished or a table has recorded what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minbert import cli
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.report.run_result import RunResult, result_of
from minbert.runs.resume import departures
from minbert.runs.run_directory import Run
from minbert.training.child_process import train_in_process


def finished_run(
    directory: Path, arguments: Sequence[str], seed: int, recorded: RunResult | None, table: Path
) -> RunResult:
    """What a run comes to: trained to its end, or as recorded where its directory is not there.

    Args:
        arguments: of `minbert train`, with `--seed` and `--out`.
        recorded: what the file `table` has of it.

    Raises:
        UserError: the recorded run has other options, or training fails.
        Stopped: a signal came. The run has saved a checkpoint.
    """
    if recorded is not None and not directory.exists():
        changed = departures(recorded.options, cli.parse_layers("train", TrainConfig, arguments))
        if changed:
            raise UserError(
                f"{table} holds a run with other options: {', '.join(changed.values())}; give another --table"
            )
        return recorded
    if problem := train_in_process(directory, arguments):
        raise UserError(problem)
    return result_of(Run(directory), seed)
