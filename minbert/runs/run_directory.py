"""The run directory: what is in it, who may write to it, and how a run is opened again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from minbert.config import TrainConfig
from minbert.data import Encoded, SkippedRow, names_hub, write_skipped
from minbert.errors import UserError
from minbert.files.atomic import (
    append_line,
    readable,
    recover,
    sync,
    verify,
    write_atomically,
    write_json,
    writing,
)
from minbert.files.lock import LOCK, locked
from minbert.files.validation import FORMAT
from minbert.runs.checkpoint import load_progress
from minbert.runs.resume import remarks, resumed
from minbert.runs.schemas import Prediction, check_links, read_metrics, read_predictions, read_summary
from minbert.tasks import Task
from minbert.tasks.metrics import predictions, probabilities

RESUME = "free some space and run the same command with --resume"
BEFORE_A_RUN = (LOCK, ".config.yaml.tmp")  # what a run that was killed as it began may leave


class Run:
    """A run directory: config.yaml, metrics.jsonl, summary.json, best/, last/, predictions/ and plots/."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.best = self.path / "best"
        self.last = self.path / "last"
        self.metrics = self.path / "metrics.jsonl"
        self.skipped = self.path / "skipped.jsonl"
        self.board: Any = None  # a SummaryWriter, or None
        self.record: TrainConfig | None = None  # the options before it was resumed

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Hold the directory for writing: one with a run to resume it, else an empty one, or one that a run was begun
        in without coming to a checkpoint.

        Raises:
            UserError: it holds something already, no run or a damaged one to resume, or another process writes to it.
        """
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
                if self.board is not None:
                    self.board.close()

    def _check_usable(self, resume: bool) -> None:
        begun = (self.path / "config.yaml").exists()
        if resume and not begun:
            raise UserError(f"{self.path}: no such run directory; without --resume the command starts a run")
        if not resume and self.has_checkpoint:
            raise UserError(f"{self.path} holds a run: give --resume to continue it, or another --out")
        if begun:
            self.config()
        elif self.path.is_dir() and any(entry.name not in BEFORE_A_RUN for entry in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty, and holds no run: give another --out")

    @property
    def has_checkpoint(self) -> bool:
        return readable(self.last).exists() or readable(self.best).exists()

    def where_it_stands(self) -> str:
        """What is saved, and how to go on."""
        last = readable(self.last)
        if last.exists():
            return f"{last} holds step {load_progress(last).step}: the same command with --resume goes on"
        return "nothing is saved yet: the same command begins anew"

    def options(self, given: TrainConfig, console: Console) -> TrainConfig:
        """The options with which the run begins or goes on.

        Raises:
            UserError: it is resumed, and an option that may not change differs from its record.
        """
        if not self.has_checkpoint:
            if (self.path / "config.yaml").exists():
                console.print(f"{self.path} was begun and nothing of it is saved: it begins anew")
            return given
        self.record = self.config()
        config = resumed(self.record, given, self.path)
        computing = {"threads": config.threads, "backend": config.backend, "matmul": config.matmul}
        for line in remarks(self.record, given.replace(**computing)):
            console.print(line)
        return config

    def write_options(self, config: TrainConfig) -> None:
        """Record the options of the run that begins, or goes on.

        Raises:
            UserError: the disk refuses them.
        """
        text = config.replace(resume=False).to_yaml()
        with writing(self.path, "choose another --out"):
            write_atomically(self.path / "config.yaml", text)

    def check_seen(self) -> None:
        """Raise a UserError where the directory of a run that has begun is not to be seen."""
        if not (self.path / "config.yaml").exists():
            raise UserError(f"{self.path} is not there for every process: all machines have to share its file system")

    def config(self) -> TrainConfig:
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run directory")
        check_links(self.path)
        return TrainConfig.from_yaml(self.path / "config.yaml")

    def own_data(self, config: TrainConfig) -> str | None:
        """The data that the run's options name. What they name on the hub is not fetched: the file may be anyone's.

        Raises:
            UserError: it is on the hub.
        """
        data = config.data
        if data is not None and names_hub(data):
            raise UserError(f"{self.path}/config.yaml names the data {data} of the hub; give --data {data} to fetch it")
        return data

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            UserError: the disk refuses it.
        """
        with writing(self.metrics, RESUME):
            append_line(self.metrics, json.dumps(_finite(record)))
        if self.board is not None:
            for name, value in _flat(record):
                self.board.add_scalar(name, value, record["step"])

    def open_board(self, step: int) -> None:
        """Write what `log` writes to tensorboard/ too, from `step` on.

        Raises:
            UserError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs the package tensorboard: pip install 'minbert[tensorboard]'") from None
        self.board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def sync(self) -> None:
        """Have the disk know the lines of metrics.jsonl, before a checkpoint that comes after them."""
        if self.metrics.exists():
            with writing(self.metrics, RESUME):
                sync(self.metrics)

    def forget_after(self, step: int) -> list[str]:
        """Drop the lines of metrics.jsonl that a resumed run will write again, a half-written last one, and damaged
        ones.

        Returns:
            what is wrong with each damaged one.
        """
        records, problems = read_metrics(self.metrics) if self.metrics.exists() else ([], [])
        kept = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
        with writing(self.metrics, RESUME):
            write_atomically(self.metrics, "".join(kept))
        return problems

    def forget_summary(self) -> None:
        """Drop summary.json: the run has not finished."""
        with writing(self.path, RESUME):
            (self.path / "summary.json").unlink(missing_ok=True)

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a last line that a crash cut short.

        Raises:
            UserError: a line is damaged.
        """
        records, problems = read_metrics(self.metrics) if self.metrics.exists() else ([], [])
        if problems:
            raise UserError(f"{problems[0]}; {len(problems)} such; --resume of the run drops them")
        return records

    def write_summary(self, summary: dict[str, Any]) -> None:
        with writing(self.path, RESUME):
            write_json(self.path / "summary.json", {"format": FORMAT, **summary})

    def summary(self) -> dict[str, Any]:
        """What summary.json holds; nothing while the run has not finished.

        Raises:
            UserError: it is damaged, or a later minbert wrote it.
        """
        path = self.path / "summary.json"
        return read_summary(path) if path.exists() else {}

    def predictions_directory(self, place: str = "") -> Path:
        """predictions/, where those of the best epoch for the run's own data are, or a place under it for others."""
        return self.path / "predictions" / place

    def write_predictions(
        self, task: Task, split: str, examples: Encoded, outputs: np.ndarray, place: str = ""
    ) -> Path:
        """Write predictions/<task>-<split>-output.csv in the course's format; and <task>-<split>.jsonl, which adds
        labels, lengths and the probabilities of the classes.

        Args:
            outputs: the head's for every example, [n, C] or [n].
            place: of `predictions_directory`.

        Returns:
            The former.
        """
        path = self.predictions_directory(place) / f"{task.predictions}-{split}-output.csv"
        predicted = predictions(task, outputs)
        with writing(path, "free some space and run minbert.evaluate"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(format_predictions(task, examples.ids, predicted)))
            write_atomically(self._details(task, split, place), "".join(_format_details(task, examples, outputs)))
        return path

    def predictions(self, task: Task, split: str) -> list[Prediction] | None:
        """What `write_predictions` wrote, in the order of the examples; None if there is nothing.

        Raises:
            UserError: it is damaged.
        """
        path = self._details(task, split, "")
        if not path.exists():
            return None
        return read_predictions(path, task, f"minbert.evaluate {self.path} writes it anew")

    def _details(self, task: Task, split: str, place: str) -> Path:
        return self.predictions_directory(place) / f"{task.predictions}-{split}.jsonl"

    def write_skipped(self, rows: Sequence[SkippedRow]) -> None:
        """Write skipped.jsonl: the rows of the run's data that were left out.

        Raises:
            UserError: the disk is full.
        """
        with writing(self.skipped, RESUME):
            write_skipped(self.skipped, rows)


class Followed(Run):
    """A run directory that another process writes."""

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        yield

    def options(self, given: TrainConfig, console: Console) -> TrainConfig:
        return given

    def write_options(self, config: TrainConfig) -> None:
        pass

    def log(self, record: dict[str, Any]) -> None:
        pass

    def open_board(self, step: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def forget_after(self, step: int) -> list[str]:
        return []

    def forget_summary(self) -> None:
        pass

    def write_skipped(self, rows: Sequence[SkippedRow]) -> None:
        pass


def _finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested record, named by their paths."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def format_predictions(task: Task, ids: Sequence[str], predicted: np.ndarray) -> list[str]:
    """Lines of a prediction file in the course's format: a header, then `id , prediction`."""
    lines = [f"{identifier} , {value} \n" for identifier, value in zip(ids, predicted.tolist(), strict=True)]
    return [f"id \t {task.predicted} \n", *lines]


def _format_details(task: Task, examples: Encoded, outputs: np.ndarray) -> Iterator[str]:
    """A `Prediction` as a line of JSON for every example, without the fields that are None."""
    rows = {"id": examples.ids, "predicted": predictions(task, outputs).tolist(), "tokens": examples.lengths.tolist()}
    if examples.labels is not None:
        rows["label"] = examples.labels.astype(np.float64).round(4).tolist()
    classes = probabilities(task, outputs)
    if classes is not None:
        rows["probabilities"] = classes.round(6).tolist()
    for values in zip(*rows.values(), strict=True):
        yield json.dumps(dict(zip(rows, values, strict=True))) + "\n"
