"""Runs that are trained in processes of their own, one or several at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from minbert import cli
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.runs.resume import LENGTH, differences
from minbert.runs.run_directory import Run
from minbert.training.stop_signal import Stopped

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)  # exit codes


class TrainingProcesses:
    """The processes that train now; threads may share it.

    Args:
        named: whether several train at once. Then the run's name stands before each line that one prints, and no
            process has the terminal to draw on.
    """

    def __init__(self, named: bool) -> None:
        self._named = named
        self._changed = threading.Condition()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = False

    def train(self, directory: Path, arguments: Sequence[str], name: str) -> str | None:
        """`minbert train` with these arguments, unless the run has finished; with --resume if it can go on.

        Returns:
            the error, in one line; None for a run that has finished.

        Raises:
            Stopped: a signal came to the process, which has saved a checkpoint; or `stop` was called.
        """
        if (directory / "summary.json").exists():
            finished, problem = _finished(directory, arguments)
            if finished or problem:
                return problem
        command = [sys.executable, "-m", "minbert.train", *arguments]
        command += ["--resume"] if (directory / "config.yaml").exists() else []
        out, err = (subprocess.PIPE, subprocess.STDOUT) if self._named else (None, subprocess.PIPE)
        with self._changed:
            if self._stopping:
                raise Stopped(signal.SIGINT)
            process = subprocess.Popen(command, text=True, errors="replace", stdout=out, stderr=err)
            self._running.add(process)
        try:
            printed = (process.stdout, f"{name}: ", sys.stdout) if self._named else (process.stderr, "", sys.stderr)
            last = _pass_on(*printed)
            code = process.wait()
        finally:
            with self._changed:
                self._running.discard(process)
                self._changed.notify_all()
        if code in STOPPED:
            raise Stopped(signal.SIGINT)
        return None if code == 0 else last.removeprefix("error: ") or f"exit code {code}"

    def stop(self, number: int) -> None:
        """Send a signal to all processes, which may have got it from the terminal too, and start no more."""
        with self._changed:
            self._stopping = True
            for process in self._running:
                process.send_signal(number)

    def join(self) -> None:
        """Wait until all processes have ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)


def _pass_on(lines: IO[str] | None, prefix: str, stream: IO[str]) -> str:
    """Write what a process has printed through its own terminal, but empty lines and its error; returns the last."""
    last = ""
    for line in lines or ():
        last = line.strip() or last
        if line.strip() and not line.startswith("error: "):
            stream.write(prefix + line)
            stream.flush()
    return last


def _finished(directory: Path, arguments: Sequence[str]) -> tuple[bool, str | None]:
    """Whether the run that a directory has the summary of has these options, and why it is another one, in one line."""
    try:
        changed = differences(Run(directory).config(), cli.parse_layers("train", TrainConfig, arguments))
    except UserError as error:
        return False, str(error)
    other = [change for name, change in changed.items() if name not in LENGTH]
    if other:
        return False, f"{directory} holds a run with other options: {', '.join(other)}; give another --out"
    return not changed, None
