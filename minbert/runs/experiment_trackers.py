"""Experiment trackers that get the numbers of metrics.jsonl too: TensorBoard, Weights & Biases, Trackio, MLflow.

Each through its own client, which its own environment variables configure, such as WANDB_MODE and MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from minbert.errors import UserError, first_line
from minbert.files.atomic import write_json, writing
from minbert.files.json_yaml import read_json

PROJECT = "minbert"  # the project, or experiment, of a run
IDS = "trackers.json"  # in a run directory: by tracker, the id under which a resumed run goes on
MLFLOW_PARAMS, MLFLOW_CHARACTERS = 100, 500  # of a batch; of a value

Numbers = Mapping[str, float]


class Tracker(Protocol):
    """What a client offers, once it is open."""

    @property
    def id(self) -> str | None:
        """Under which a resumed run goes on; None where the run directory says that."""

    def log(self, numbers: Numbers, step: int) -> None: ...

    def close(self, finished: bool) -> None: ...


class TensorBoard:
    def __init__(self, run: Path, config: Mapping[str, Any], recorded: str | None, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = None
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, numbers: Numbers, step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Its own step only grows; it would drop those that a resumed run takes again. So `step` is a number, too."""

    def __init__(self, run: Path, config: Mapping[str, Any], recorded: str | None, step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=run.name,
            config=dict(config),
            id=recorded,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")
        self.id = self._run.id

    def log(self, numbers: Numbers, step: int) -> None:
        self._run.log({**numbers, "step": step})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    def __init__(self, run: Path, config: Mapping[str, Any], recorded: str | None, step: int) -> None:
        import trackio

        self._trackio = trackio
        self.id = recorded or f"{run.name}-{time.time_ns():x}"
        trackio.init(project=PROJECT, name=self.id, config=dict(config), resume="allow", embed=False)

    def log(self, numbers: Numbers, step: int) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self, finished: bool) -> None:
        self._trackio.finish()


class MLflow:
    def __init__(self, run: Path, config: Mapping[str, Any], recorded: str | None, step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if recorded is not None:
            self.id = self._client.get_run(recorded).info.run_id
            self._client.update_run(self.id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(PROJECT)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        self.id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        params = [Param(name, str(value)[:MLFLOW_CHARACTERS]) for name, value in flat(config, ".")]
        for first in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self.id, params=params[first : first + MLFLOW_PARAMS])

    def log(self, numbers: Numbers, step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], str | None, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}
OFFLINE = {"wandb": "WANDB_MODE=offline keeps its records on this machine"}


class Trackers:
    """The open trackers of a run. One that fails gets no more numbers; the run goes on, and says so once.

    Args:
        names: of `TRACKERS`.
        run: the run directory.
        config: the options of the run.
        step: after which the run begins or goes on.
        warn: takes a line for the terminal.

    Raises:
        UserError: a client is not installed, or does not start.
    """

    def __init__(
        self, names: list[str], run: Path, config: Mapping[str, Any], step: int, warn: Callable[[str], object]
    ) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        ids = read_json(run / IDS) if (run / IDS).exists() else {}
        try:
            for name in dict.fromkeys(names):
                self._open[name] = _opened(name, run, config, ids.get(name), step)
        except BaseException:
            self.close(finished=False)
            raise
        ids |= {name: tracker.id for name, tracker in self._open.items() if tracker.id is not None}
        if ids:
            with writing(run / IDS, "free some space"):
                write_json(run / IDS, ids)

    def log(self, record: Mapping[str, Any]) -> None:
        """Give them the numbers of a line of metrics.jsonl; those that were not finite are left out there."""
        numbers = {name: value for name, value in flat(record) if value is not None and name != "step"}
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(numbers, record["step"])
            except Exception as error:
                del self._open[name]
                self._warn(
                    f"warning: {name} gets no more numbers after step {record['step']}, metrics.jsonl has all of them: "
                    f"{first_line(error)}"
                )

    def close(self, finished: bool) -> None:
        """Close them; a tracker that shows how a run ended is told whether it finished."""
        for name, tracker in self._open.items():
            try:
                tracker.close(finished)
            except Exception as error:
                self._warn(f"warning: {name} may lack the last numbers, metrics.jsonl has them: {first_line(error)}")
        self._open = {}


def _opened(name: str, run: Path, config: Mapping[str, Any], recorded: str | None, step: int) -> Tracker:
    """
    Raises:
        UserError: the client is not installed, or does not start.
    """
    try:
        return TRACKERS[name](run, config, recorded, step)
    except Exception as error:
        remedy = f"pip install 'minbert[{name}]'" if isinstance(error, ImportError) else OFFLINE.get(name)
        raise UserError("; ".join(filter(None, (f"--log-to {name}: {first_line(error)}", remedy)))) from None


def flat(record: Mapping[str, Any], separator: str = "/", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested record, named by their paths."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, separator, f"{prefix}{name}{separator}")
        else:
            yield prefix + name, value
