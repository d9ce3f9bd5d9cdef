"""Fine-tune on several tasks at once: `minbert train`, and `minbert.fit` from Python.

The training loop is minbert/training/loop.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from minbert import cli
from minbert.config import TrainConfig
from minbert.console import Terminal
from minbert.cross_validation import CrossValidation, cross_validate, has_begun
from minbert.device import freed_memory_kept, resolve_device
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.runs.run_directory import Run
from minbert.training.callbacks import Callbacks, EpochInfo, StepInfo
from minbert.training.loop import train
from minbert.training.stop_signal import Stopped

_one_at_a_time = threading.RLock()


def main(arguments: Sequence[str]) -> int:
    try:
        train_here(cli.parse_layers("train", TrainConfig, arguments))
    except Stopped as stopped:
        return 128 + stopped.number
    return 0


def fit(
    config: TrainConfig | None = None,
    /,
    *,
    on_step: Callable[[StepInfo], object] | None = None,
    on_epoch: Callable[[EpochInfo], object] | None = None,
    quiet: bool = False,
    **options: Any,
) -> Run | CrossValidation:
    """Train a run, as `minbert train` does.

        run = minbert.fit(recipe="pcgrad", data="DIR", out="runs/first", smart={"lambda_s": 0})

    The process is left as it was. One run at a time trains in a process, on any thread, as kernels and threads are
    chosen for all of it: a further one waits. With `resume=True` a run that was stopped goes on. Processes that
    torchrun started all call this, and train together.

    Args:
        config: all options at once, in place of `options`, used as they are. A `recipe` in it is recorded, and none of
            its options are applied: give `recipe` among `options` for that.
        on_step, on_epoch: called after each step, and after each epoch is scored and saved. One that returns True stops
            the run: the epoch is scored as far as it went, and the run is saved and finished, as with `patience`. After
            an error in one, which is raised here, the run can be resumed. Of several processes the first calls them.
        quiet: print nothing.
        options: those of the command, by the names of `TrainConfig`'s fields, `config` (a file of options) among them.
            They override that file, and the file overrides `recipe`. An option of several parts is a dictionary.

    Returns:
        the run; with `folds` (and no `fold`) the runs of all folds.

    Raises:
        UserError: bad input, a disk that refuses to be written, or a loss that stays non-finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM came, on the main thread; the run can be resumed.
        SystemExit: with several processes, another one ended, stopped answering, or raised the error.
    """
    if config is None:
        config = cli.parse_layers("train", TrainConfig, plain(options))
    elif not isinstance(config, TrainConfig):
        raise UserError(f"fit: expected a TrainConfig or options by name, got {type(config).__name__}")
    elif options:
        raise UserError(f"fit: got a TrainConfig and {', '.join(options)}; give config.replace(...) alone")
    return train_here(config, Callbacks(on_step, on_epoch), quiet=quiet)


def train_here(
    config: TrainConfig, callbacks: Callbacks | None = None, *, quiet: bool = False
) -> Run | CrossValidation:
    """`start` in this process alone, or in the group of those that torchrun started."""
    config = restarted(config)
    device = resolve_device(config.device)
    with _one_at_a_time, freed_memory_kept(device), ProcessGroup.join(device, config.timeout) as group:
        named = config.replace(out=group.broadcast_object(config.out or new_run()))
        console = Terminal(quiet=quiet or not group.is_main)
        try:
            found = start(named, console, group, callbacks)
        except Stopped:
            if config.out is None and has_begun(named):
                console.print(f"with --resume, give --out {named.out}")
            raise
        group.broadcast_object("written")
    return found


def start(
    config: TrainConfig, console: Console, group: ProcessGroup, callbacks: Callbacks | None = None
) -> Run | CrossValidation:
    """Train a run, or with --folds and no --fold the runs of all folds; raises as `train` does."""
    assert config.out is not None
    if config.folds is not None and config.fold is None:
        cross_validate(config, console, group, callbacks)
        return CrossValidation(config.out)
    train(config, console, group, callbacks)
    return Run(config.out)


def plain(value: Any) -> Any:
    """An option's value as a file of options would give it: no paths, tuples, numbers of NumPy or records."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(plain, value))
    return value.item() if isinstance(value, np.generic) else os.fspath(value) if isinstance(value, Path) else value


def new_run() -> str:
    """A directory for a run without --out: runs/<date>-<time>, with a number where that one is there."""
    name = f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(each for each in names if not Path(each).exists())


def restarted(config: TrainConfig) -> TrainConfig:
    """The options for a process that torchrun has started again (--max-restarts): the run goes on.

    Raises:
        UserError: it cannot be found.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or config.resume:
        return config
    if config.out is None:
        raise UserError("--max-restarts of torchrun needs --out: a process that is started again finds the run there")
    return config.replace(resume=has_begun(config))


if __name__ == "__main__":
    cli.run(main)
