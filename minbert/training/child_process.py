"""Trains a run in a separate process, unless it has finished."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from minbert import cli
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.runs.resume import LENGTH, differences
from minbert.runs.run_directory import Run
from minbert.training.stop_signal import Stopped

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)  # exit codes


def train_in_process(directory: Path, arguments: Sequence[str]) -> str | None:
    """Run `minbert train` with these arguments, with --resume if the run in the directory can go on.

    Returns:
        the error, in one line; None for a run that has finished.

    Raises:
        Stopped: a signal came. The run has saved a checkpoint.
    """
    if (directory / "summary.json").exists():
        try:
            changed = differences(Run(directory).config(), cli.parse_layers("train", TrainConfig, arguments))
        except UserError as error:
            return str(error)
        other = [change for name, change in changed.items() if name not in LENGTH]
        if other:
            return f"{directory} holds a run with other options: {', '.join(other)}; give another --out"
        if not changed:
            return None
    command = [sys.executable, "-m", "minbert.train", *arguments]
    command += ["--resume"] if (directory / "config.yaml").exists() else []
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = run.communicate()
    except Stopped as stopped:
        if stopped.number != signal.SIGINT:  # which the terminal sends to both
            run.send_signal(stopped.number)
        run.wait()
        raise
    if run.returncode in STOPPED:
        raise Stopped(signal.SIGINT)
    if run.returncode == 0:
        return None
    last = [line for line in errors.splitlines() if line.strip()][-1:] or [f"exit code {run.returncode}"]
    return last[0].removeprefix("error: ")
