"""Runs that are trained, one or several at once, unless they have finished or a table has what they came to."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from minbert import cli
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.report.run_result import RunResult, result_of
from minbert.runs.resume import departures
from minbert.runs.run_directory import Run
from minbert.training.child_process import TrainingProcesses
from minbert.training.stop_signal import Stopped


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be there."""

    name: str  # for people
    directory: Path
    arguments: Sequence[str]  # of `minbert train`, with --seed and --out
    seed: int = 0
    recorded: RunResult | None = None  # what the table has of it


def finish_runs(
    runs: Sequence[PlannedRun],
    table: Path,
    jobs: int,
    begin: Callable[[PlannedRun], None],
    end: Callable[[PlannedRun, RunResult | UserError], None],
    *,
    delete_checkpoints: bool = False,
) -> None:
    """Train runs that have not finished; those that the table has and whose directory is not there are not trained.

    Args:
        table: the file, for messages.
        jobs: how many train at once. Of several, each has its share of the CPU threads that one would have, unless its
            arguments say otherwise.
        begin: called with each run before it is trained.
        end: called with each run and what it came to, or why it failed, as they finish.
        delete_checkpoints: those of each run that has finished, after `end`.

    Raises:
        Stopped: a signal came. The runs that were being trained have saved a checkpoint.
        Exception: what `end` raises. They have been stopped then, and have saved one too.
    """
    processes = TrainingProcesses(named=jobs > 1)
    threads = max(1, torch.get_num_threads() // jobs) if jobs > 1 else None

    def outcome(run: PlannedRun) -> RunResult | UserError | Stopped:
        try:
            return _finished(run, table, processes, threads)
        except (UserError, Stopped) as error:
            return error

    to_begin, training = iter(runs), dict[Future[RunResult | UserError | Stopped], PlannedRun]()

    def begin_next() -> None:
        for run in islice(to_begin, 1):
            begin(run)
            training[pool.submit(outcome, run)] = run

    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for _ in range(jobs):
                    begin_next()
                while training:
                    for future in wait(training, return_when=FIRST_COMPLETED).done:
                        found = future.result()
                        if isinstance(found, Stopped):
                            raise found  # only that process got a signal
                        run = training.pop(future)
                        end(run, found)
                        if delete_checkpoints and isinstance(found, RunResult):
                            Run(run.directory).delete_checkpoints()
                        begin_next()
            except BaseException as error:
                processes.stop(error.number if isinstance(error, Stopped) else signal.SIGTERM)
                processes.join()  # a signal while a thread starts leaves one that the pool does not know
                raise
    except Stopped as stopped:
        processes.stop(stopped.number)  # a second signal, while they save
        raise


def _finished(run: PlannedRun, table: Path, processes: TrainingProcesses, threads: int | None) -> RunResult:
    """What a run comes to: trained to its end, or as recorded where its directory is not there.

    Raises:
        UserError: the recorded run has other options, or training fails.
        Stopped: a signal came.
    """
    if run.recorded is not None and not run.directory.exists():
        changed = departures(run.recorded.options, cli.parse_layers("train", TrainConfig, run.arguments))
        if changed:
            raise UserError(
                f"{table} holds a run with other options: {', '.join(changed.values())}; give another --table"
            )
        return run.recorded
    arguments = [*run.arguments]
    if threads is not None and cli.parse_layers("train", TrainConfig, arguments).threads is None:
        arguments.append(f"--threads={threads}")
    if problem := processes.train(run.directory, arguments, run.name):
        raise UserError(problem)
    return result_of(Run(run.directory))
