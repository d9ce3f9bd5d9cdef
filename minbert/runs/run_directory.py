"""The run directory: what it holds, which process may write to it, and how a run in it starts and resumes."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from minbert.config import TASKS_FILE, TrainConfig
from minbert.data import Folds, SkippedRow, Source, names_hub, open_source, write_skipped
from minbert.errors import UserError, require_known
from minbert.files import MANIFEST
from minbert.files.atomic import (
    readable,
    recover,
    remove_directory,
    verify,
    write_atomically,
    write_json,
    writing,
)
from minbert.files.json_yaml import VOCABULARY_LIMIT, read_text
from minbert.files.lock import LOCK, locked
from minbert.files.schema_checks import FORMAT
from minbert.runs.epochs import Epoch, epochs
from minbert.runs.metrics_log import RESUME, MetricsLog
from minbert.runs.predictions import PredictedExample, read_predictions
from minbert.runs.progress_counters import load_progress
from minbert.runs.resume import remarks, resumed
from minbert.runs.scores import read_summary
from minbert.tasks import Task, read_tasks, tasks_to_yaml
from minbert.tasks.tasks_file import HUB

# What a run that was killed at its start may leave.
BEFORE_A_RUN = (LOCK, ".config.yaml.tmp", TASKS_FILE, f".{TASKS_FILE}.tmp")


class Run:
    """A run directory: config.yaml, metrics.jsonl, summary.json, report.html, best/, last/, predictions/ and plots/.

    It reads what is there when it is asked, so that a run that goes on can be watched. A notebook shows its report.

    Args:
        writes: False for the processes of a run but the first: what would change the directory does nothing then.

    Attributes:
        path: the directory.
        best, last: its checkpoints, of the best epoch and of the last step that was saved.
        record: the options from before the run was resumed.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self.best = self.path / "best"
        self.last = self.path / "last"
        self.metrics = MetricsLog(self.path / "metrics.jsonl", writes=writes)
        self.skipped = self.path / "skipped.jsonl"
        self.record: TrainConfig | None = None

    # Start and resume -----------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Lock the directory for this process: one with a run to resume, else one that is empty or without checkpoint.

        Raises:
            UserError: it holds something already, no run or a damaged one to resume, or another process writes to it.
        """
        if not self.writes:
            yield
            return
        self._check_usable(resume)
        with locked(self.path):
            self._check_usable(resume)
            with writing(self.path, RESUME):
                recover(self.last)
                recover(self.best)
            if self.last.exists():
                verify(self.last)
            try:
                yield
            finally:
                self.metrics.close(finished=(self.path / "summary.json").exists())

    def _check_usable(self, resume: bool) -> None:
        if (self.path / MANIFEST).exists():
            raise UserError(
                f"{self.path} is a checkpoint without the state of its optimizer, which a run needs to go on; give"
                f" --model {self.path} and another --out to train its encoder further"
            )
        started = (self.path / "config.yaml").exists()
        if resume and not started:
            raise UserError(f"{self.path}: no such run directory; without --resume the command starts a run")
        if not resume and self.has_checkpoint:
            raise UserError(f"{self.path} holds a run: give --resume to continue it, or another --out")
        if started:
            self.config()
        elif self.path.is_dir() and any(entry.name not in BEFORE_A_RUN for entry in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty, and holds no run: give another --out")

    @property
    def has_checkpoint(self) -> bool:
        return readable(self.last).exists() or readable(self.best).exists()

    def delete_checkpoints(self) -> None:
        """Remove best/ and last/: scores, records and predictions stay, and the run cannot go on.

        Raises:
            UserError: the disk refuses it.
        """
        with writing(self.path, "choose another --out"):
            for checkpoint in (self.best, self.last):
                remove_directory(checkpoint)

    def where_it_stands(self) -> str:
        """Which step is saved, and how to continue."""
        last = readable(self.last)
        if last.exists():
            return f"{last} holds step {load_progress(last).step}: the same command with --resume goes on"
        return "nothing is saved yet: the same command begins anew"

    def options(self, given: TrainConfig, console: Console) -> TrainConfig:
        """The options with which the run starts or resumes.

        Raises:
            UserError: it is resumed, and an option that may not change differs from its record.
        """
        if not self.writes:
            return given
        if not self.has_checkpoint:
            if (self.path / "config.yaml").exists():
                console.print(f"{self.path} was begun and nothing of it is saved: it begins anew")
            return given
        self.record = self.config()
        config = resumed(self.record, given, self.path)
        given = given.replace(threads=config.threads, backend=config.backend, matmul=config.matmul)
        for line in remarks(self.record, given):
            console.print(line)
        return config

    def write_options(self, config: TrainConfig) -> None:
        """Write config.yaml.

        Raises:
            UserError: the disk refuses it.
        """
        if self.writes:
            with writing(self.path, "choose another --out"):
                write_atomically(self.path / "config.yaml", config.replace(resume=False).to_yaml())

    def write_tasks(self, tasks: Sequence[Task]) -> None:
        """Write tasks.yaml: the records of the tasks file, with the classes of the tasks that are trained.

        Raises:
            UserError: the disk refuses it.
        """
        if self.writes:
            with writing(self.path, "choose another --out"):
                write_atomically(self.path / TASKS_FILE, tasks_to_yaml({task.name: task for task in tasks}))

    def check_seen(self) -> None:
        """Raise a UserError where this process does not see the directory of a run that has started."""
        if not (self.path / "config.yaml").exists():
            raise UserError(f"{self.path} is not there for every process: all machines have to share its file system")

    def config(self) -> TrainConfig:
        """The options of the run.

        Raises:
            UserError: there is no run, its config.yaml is damaged, or a link leads out of the directory.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run directory")
        check_links(self.path)
        return TrainConfig.from_yaml(self.path / "config.yaml")

    def source(
        self, config: TrainConfig, data: str | None = None, tasks_file: str | None = None, *, own_dev: bool = True
    ) -> Source:
        """The data of the run's tasks.

        Data on the hub that only the run names is not fetched: its config.yaml and tasks.yaml may be anyone's.

        Args:
            data: of the built-in tasks; by default what the run's options name.
            tasks_file: names the files of the run's own tasks; by default those of the run's records.
            own_dev: whether the dev split of a run of a fold is that fold; else the data's own.

        Raises:
            UserError: the data cannot be read, or is on the hub and only the run names it.
        """
        if data is None and config.data is not None and names_hub(config.data):
            remedy = f"give --data {config.data} to fetch it"
            raise UserError(f"{self.path}/config.yaml names the data {config.data} of the hub; {remedy}")
        own = config.own_tasks
        if tasks_file is None:
            for task in (task for name, task in own.items() if name in (config.tasks or own)):
                for file in (task.train, task.dev, task.test):
                    if isinstance(file, str) and file.startswith(HUB):
                        remedy = "give --tasks-file FILE to fetch it"
                        raise UserError(f"{self.path}/{TASKS_FILE} names the data {file} of the hub; {remedy}")
        else:
            own = {
                name: _with_files_of(own[name], task) for name, task in read_tasks(tasks_file).items() if name in own
            }
            if not own:
                known = ", ".join(config.own_tasks) or "none"
                raise UserError(f"--tasks-file {tasks_file} has none of the run's own tasks: {known}")
        source = open_source(data if data is not None else config.data, own)
        if own_dev and config.folds is not None and config.fold is not None:
            source = Folds(source, config.folds, config.fold - 1)
        return source

    # Results --------------------------------------------------------------------------------------------------------

    def write_summary(self, summary: dict[str, Any]) -> None:
        with writing(self.path, RESUME):
            write_json(self.path / "summary.json", {"format": FORMAT, **summary})

    def forget_summary(self) -> None:
        """Remove summary.json: the run has not finished."""
        if self.writes:
            with writing(self.path, RESUME):
                (self.path / "summary.json").unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """What summary.json holds; nothing while the run has not finished.

        Raises:
            UserError: it is damaged, or a later minbert wrote it.
        """
        path = self.path / "summary.json"
        return read_summary(path) if path.exists() else {}

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: of steps with `loss`, and of epochs with `dev` (docs/run-directory.md).

        Raises:
            UserError: a line is damaged.
        """
        return self.metrics.records()

    def frame(self) -> Any:
        """`records` as a pandas DataFrame: a row for each, and a column for each number, such as `loss.sst`.

        Raises:
            UserError: pandas is not installed, or a line is damaged.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("Run.frame needs the package pandas: pip install 'minbert[notebook]'") from None
        return pandas.json_normalize(self.records())

    def epochs(self) -> list[Epoch]:
        """The epochs that were scored on dev, in order, with their scores and mean training losses.

        Raises:
            UserError: a line of metrics.jsonl is damaged.
        """
        return epochs(self.records())

    def scores(self, split: Literal["dev", "test"] = "dev") -> dict[str, Any]:
        """The scores of the best epoch, `{task: {metric: score}, "overall": score}`.

        Those of dev are there as soon as an epoch has ended; those of test at the end of the run, if it has labels.

        Raises:
            UserError: the split has no scores, or a file is damaged.
        """
        require_known("unknown split", split, ("dev", "test"))
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run directory")
        found: Mapping[str, Any] | None = self.summary().get(split)
        if found is None and split == "dev" and (scored := self.epochs()):
            best = max(scored, key=lambda epoch: epoch.overall)
            found = {**best.metrics, "overall": best.overall}
        if found is None:
            raise UserError(f"{self.path} has no scores on {split} yet, or no labels there")
        return dict(found)

    def __repr__(self) -> str:
        try:
            summary = self.summary()
        except UserError:
            summary = {}
        state = (
            f"best epoch {summary['best_epoch']}, overall {summary['dev']['overall']:.3f}" if summary else "unfinished"
        )
        return f"Run({str(self.path)!r}: {state})"

    def _repr_html_(self) -> str:
        """The report in a frame that runs no script, as a run may come from anywhere."""
        path = self.path / "report.html"
        if not path.exists():
            return html.escape(repr(self))
        page = html.escape(read_text(path, VOCABULARY_LIMIT))
        return f'<iframe srcdoc="{page}" sandbox="" style="width: 100%; height: 40em; border: 0"></iframe>'

    def predictions_directory(self, subdirectory: str = "") -> Path:
        """predictions/, with those of the best epoch for the run's own data, or a directory in it for others."""
        return self.path / "predictions" / subdirectory

    def predictions(self, task: Task, split: str) -> list[PredictedExample] | None:
        """The predictions of the best epoch for the run's own data (`predictions.read_predictions`)."""
        remedy = f"minbert evaluate {self.path} writes it again"
        return read_predictions(self.predictions_directory(), task, split, remedy)

    def write_skipped(self, rows: Sequence[SkippedRow]) -> None:
        """Write skipped.jsonl: the rows of the run's data that were left out.

        Raises:
            UserError: the disk is full.
        """
        if self.writes:
            with writing(self.skipped, RESUME):
                write_skipped(self.skipped, rows)


def _with_files_of(task: Task, record: Task) -> Task:
    """A run's task, with the files and columns of a record of the same name.

    Raises:
        UserError: the record is of another kind of task.
    """
    if (task.type, task.is_pair) != (record.type, record.is_pair):
        kinds = [f"{each.type} of {'pairs' if each.is_pair else 'single texts'}" for each in (task, record)]
        raise UserError(f"task {task.name} of the run is a {kinds[0]}, and in the tasks file a {kinds[1]}")
    names = ("train", "dev", "test", "text", "label", "separator", "delimiter", "id")
    return dataclasses.replace(task, **{name: getattr(record, name) for name in names})


def check_links(directory: Path) -> None:
    """Refuse a run directory with links that lead out of it: a command would read, or write, what nobody named.

    Raises:
        UserError: there is one; it is named.
    """
    root = os.path.realpath(directory)
    for folder, names, files in os.walk(directory):
        for name in (*names, *files):
            path = os.path.join(folder, name)
            if os.path.islink(path) and os.path.commonpath((root, os.path.realpath(path))) != root:
                raise UserError(
                    f"{path} is a link to {os.readlink(path)}, outside the run directory; put a copy in its place"
                )
