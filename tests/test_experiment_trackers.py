"""--log-to: each tracker's own client, offline, has the numbers of metrics.jsonl; a failing one stops no run.

The first tests need the packages of the extra [trackers]; with MINBERT_TEST_TRACKERS=1 they fail where one is missing.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from groups import quick_options

from minbert import train
from minbert.errors import UserError
from minbert.runs import experiment_trackers
from minbert.runs.experiment_trackers import IDS, PROJECT, TRACKERS, flat
from minbert.runs.run_directory import Run

Logged = dict[str, list[tuple[int, float]]]  # by name: step and value, in the order of arrival


@pytest.fixture(scope="module")
def logged(course_data, tmp_path_factory) -> tuple[Path, Path]:
    """A run of two steps that is then extended to three, and the directory with what the trackers hold."""
    for module in () if os.environ.get("MINBERT_TEST_TRACKERS") else TRACKERS:
        pytest.importorskip(module, reason="needs the extra [trackers]")
    directory = tmp_path_factory.mktemp("trackers")
    stores = {"WANDB_DIR": directory, "TRACKIO_DIR": directory / "trackio", "MLFLOW_TRACKING_URI": directory / "mlflow"}
    offline = {"WANDB_MODE": "offline", "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment = {**os.environ, **{name: str(path) for name, path in stores.items()}, **offline}
    command = [sys.executable, "-m", "minbert.train", *quick_options(course_data, directory / "run")]
    for options in (["--steps=2"], ["--steps=3", "--resume"]):
        names = ",".join(name for name in TRACKERS if name != "tensorboard")
        done = subprocess.run(
            [*command, *options, f"--log-to={names}", "--tensorboard"],
            env=environment,
            cwd=directory,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return directory / "run", directory


def of_tensorboard(run: Path, store: Path, recorded: str | None) -> Logged:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_wandb(run: Path, store: Path, recorded: str | None) -> Logged:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Logged = defaultdict(list)
    for path in sorted((store / "wandb").glob(f"offline-run-*-{recorded}/*.wandb")):
        for data in log_records(path.read_bytes()[7:]):  # after a header
            items = Record.FromString(data).history.item
            numbers = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            for name, value in numbers.items():
                if not name.startswith("_") and name != "step":
                    found[name].append((numbers["step"], value))
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: chunks of checksum, length and kind, none across blocks of 32 KiB."""
    place, block, record = 0, 2**15, b""
    while place + 7 <= len(data):
        if (left := block - (place + 7) % block) < 7:  # the header of the file counts
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield record
            record = b""


def of_trackio(run: Path, store: Path, recorded: str | None) -> Logged:
    found: Logged = defaultdict(list)
    with sqlite3.connect(store / "trackio" / f"{PROJECT}.db") as database:
        rows = database.execute("select step, metrics from metrics where run_name = ? order by id", (recorded,))
        for step, metrics in rows:
            for name, value in json.loads(metrics).items():
                found[name].append((step, value))
    return found


def of_mlflow(run: Path, store: Path, recorded: str | None) -> Logged:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=str(store / "mlflow"))
    ended = client.get_run(recorded)
    assert ended.info.status == "FINISHED"
    assert ended.data.params["smart.lambda_s"] == "1.0"
    return {
        name: [(each.step, each.value) for each in client.get_metric_history(recorded, name)]
        for name in ended.data.metrics
    }


@pytest.mark.slow
@pytest.mark.parametrize("read", [of_tensorboard, of_wandb, of_trackio, of_mlflow])
def test_a_tracker_has_the_numbers_of_the_metrics(logged, read, monkeypatch):
    """A resumed run goes on in the same record. Its first epoch's end was scored twice, after steps 2 and 3."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, store = logged
    recorded = json.loads((run / IDS).read_text()).get(read.__name__.removeprefix("of_"))
    found = read(run, store, recorded)
    expected: Logged = defaultdict(list)
    for record in Run(run).metrics.records():
        for name, value in flat(record):
            if name != "step" and value is not None:
                expected[name].append((record["step"], pytest.approx(value, rel=1e-6)))
    assert {"loss/sst", "cosine/sst/qqp", "dev/sts/pearson", "seconds/backward"} <= expected.keys()
    assert [step for step, _ in expected["loss/sst"]] == [1, 2, 3]
    for name, numbers in expected.items():
        assert sorted(found[name], key=lambda pair: pair[0]) == numbers, name


class Failing:
    """Takes the numbers of one line, and then no more."""

    id = None

    def __init__(self, *arguments: object) -> None:
        self.lines = 0

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.lines += 1
        if self.lines > 1:
            raise ConnectionError("the server is gone\nand more")

    def close(self, finished: bool) -> None:
        raise AssertionError("closed after it failed")


def test_a_failing_tracker_stops_no_run_and_says_so_once(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TRACKERS, "wandb", Failing)
    assert train.main([*quick, "--steps=4", "--log-to=wandb"]) == 0
    line = "warning: wandb gets no more numbers after step 2, metrics.jsonl has all of them: the server is gone\n"
    assert capsys.readouterr().out.count(line) == 1
    assert sum("dev" not in record for record in Run(tmp_path / "run").metrics.records()) == 4


def test_a_tracker_that_does_not_start_is_one_line(quick, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise ValueError("no API key\nand more")

    monkeypatch.setitem(TRACKERS, "wandb", refuse)
    with pytest.raises(UserError) as error:
        train.main([*quick, "--log-to=wandb"])
    assert str(error.value) == "--log-to wandb: no API key; WANDB_MODE=offline keeps its records on this machine"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_client_names_its_extra(name, quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(UserError, match=rf"--log-to {name}: .*{name}.*; pip install 'minbert\[{name}\]'$"):
        train.main([*quick, f"--log-to={name}"])


def test_an_unknown_tracker_is_refused(quick):
    with pytest.raises(UserError, match=r"^--log-to\[0\]: expected one of 'tensorboard', .*, got 'comet'$"):
        train.main([*quick, "--log-to=comet"])


def test_those_that_are_open_are_closed_where_another_does_not_start(quick, monkeypatch):
    closed = []

    class Open(Failing):
        def close(self, finished: bool) -> None:
            closed.append(finished)

    monkeypatch.setitem(TRACKERS, "wandb", Open)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="mlflow"):
        train.main([*quick, "--log-to=wandb,mlflow"])
    assert closed == [False]


def test_every_tracker_has_an_extra():
    pyproject = (Path(experiment_trackers.__file__).parents[2] / "pyproject.toml").read_text()
    for name in TRACKERS:
        assert f'\n{name} = ["{name}>=' in pyproject
