"""The run directory: what is in it, who may write to it, and how a run is opened again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minbert.config import TrainConfig
from minbert.data import Encoded
from minbert.errors import UserError
from minbert.files import LOCK, locked, no_room_is_a_user_error, recover, verify, write_atomically, write_json
from minbert.metrics import predictions, probabilities
from minbert.tasks import Task


@dataclass(frozen=True)
class Prediction:
    """What a run says of one example."""

    id: str
    predicted: float
    tokens: int  # that the model read
    label: float | None = None
    probabilities: list[float] | None = None  # of each class; None for a task without classes


class Run:
    """A run directory: config.yaml, metrics.jsonl, summary.json, best/, last/, predictions/ and plots/."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.best = self.path / "best"
        self.last = self.path / "last"
        self.metrics = self.path / "metrics.jsonl"
        self.board: Any = None  # a SummaryWriter, or None

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Hold the directory for writing: an empty one for a new run, one that holds a run to resume it.

        Raises:
            UserError: it holds something already, no run or a damaged one to resume, or another process writes to it.
        """
        if resume:
            self.config()
        elif self.path.is_dir() and any(entry.name != LOCK for entry in self.path.iterdir()):
            what = "holds a run" if (self.path / "config.yaml").exists() else "is not empty"
            raise UserError(f"{self.path} {what}: give --resume to continue it, or another --out")
        with locked(self.path):
            recover(self.last)
            recover(self.best)
            if self.last.exists():
                verify(self.last)
            try:
                yield
            finally:
                if self.board is not None:
                    self.board.close()

    def begin(self, config: TrainConfig) -> None:
        """Record the options of a new run.

        Raises:
            UserError: the disk is full.
        """
        with no_room_is_a_user_error(self.path, "choose another --out"):
            write_atomically(self.path / "config.yaml", config.replace(resume=False).to_yaml())

    def check_seen(self) -> None:
        """Raise a UserError where the directory of a run that has begun is not to be seen."""
        if not (self.path / "config.yaml").exists():
            raise UserError(f"{self.path} is not there for every process: all machines have to share its file system")

    def check_same(self, config: TrainConfig) -> None:
        """Raise a UserError that names the options in which `config` differs from those the run was started with."""
        saved, free = self.config(), ("out", "resume", "timeout")
        differing = [
            f"--{field.name.replace('_', '-')} (was {getattr(saved, field.name)}, is {getattr(config, field.name)})"
            for field in dataclasses.fields(config)
            if field.name not in free and getattr(saved, field.name) != getattr(config, field.name)
        ]
        if differing:
            raise UserError(f"{self.path} was started with other options: {', '.join(differing)}; resume with its own")

    def config(self) -> TrainConfig:
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run directory")
        return TrainConfig.from_yaml(self.path / "config.yaml")

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        remedy = "free some space and run the same command with --resume"
        with no_room_is_a_user_error(self.metrics, remedy), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record)) + "\n")
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

    def forget_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that a resumed run will write again, and a half-written last one."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_atomically(self.metrics, "".join(kept))

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a last line that a crash cut short."""
        records = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
        return records

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    def summary(self) -> dict[str, Any]:
        """What summary.json holds; nothing while the run has not finished.

        Raises:
            UserError: it is damaged.
        """
        path = self.path / "summary.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); --resume of the run writes it anew") from None

    def write_predictions(self, task: Task, split: str, examples: Encoded, outputs: np.ndarray) -> Path:
        """Write predictions/<task>-<split>-output.csv in the course's format; and <task>-<split>.jsonl, which adds
        labels, lengths and the probabilities of the classes.

        Args:
            outputs: the head's for every example, [n, C] or [n].

        Returns:
            The former.
        """
        path = self.path / "predictions" / f"{task.predictions}-{split}-output.csv"
        path.parent.mkdir(exist_ok=True)
        predicted = predictions(task, outputs)
        with no_room_is_a_user_error(path, "free some space and run minbert.evaluate"):
            write_atomically(path, "".join(format_predictions(task, examples.ids, predicted)))
            write_atomically(self._details(task, split), "".join(_format_details(task, examples, outputs)))
        return path

    def predictions(self, task: Task, split: str) -> list[Prediction] | None:
        """What `write_predictions` wrote, in the order of the examples; None if there is nothing.

        Raises:
            UserError: it is damaged.
        """
        path = self._details(task, split)
        if not path.exists():
            return None
        try:
            return [Prediction(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; minbert.evaluate {self.path} writes it anew") from None

    def _details(self, task: Task, split: str) -> Path:
        return self.path / "predictions" / f"{task.predictions}-{split}.jsonl"


class Followed(Run):
    """A run directory that another process writes."""

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        yield

    def begin(self, config: TrainConfig) -> None:
        pass

    def log(self, record: dict[str, Any]) -> None:
        pass

    def open_board(self, step: int) -> None:
        pass

    def forget_after(self, step: int) -> None:
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
