"""`minbert.fit` trains as the command does, says what the command says, and leaves the process as it was."""

from __future__ import annotations

import datetime
import signal
import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from compare_runs import assert_equal_runs
from groups import SMALL
from test_library import process_state

import minbert
from minbert import TrainConfig, UserError, train
from minbert.cross_validation import CrossValidation
from minbert.methods.smart import SmartConfig
from minbert.runs.run_directory import Run
from minbert.training.stop_signal import Stopped


@pytest.fixture
def options(course_data, tmp_path) -> dict[str, object]:
    small = {name: value for name, value in SMALL.items() if name != "recipe"}
    return {**small, "data": course_data, "out": tmp_path / "run", "steps": 2}


@pytest.fixture(scope="module")
def by_command(shared, tmp_path_factory) -> Path:
    """A run of the command, with a recipe, a file of options and options of its own."""
    out = tmp_path_factory.mktemp("command") / "run"
    words = ["--recipe=smart-pcgrad", "--smart.lambda-s=0.5", "--heads.sts=cosine", "--steps=2"]
    assert train.main([*shared[1], *words, f"--out={out}"]) == 0
    return out


def file_and_data(shared) -> dict[str, str]:
    return dict(option.removeprefix("--").split("=", 1) for option in shared[1])


def test_options_give_the_run_of_the_command(by_command, shared, tmp_path, capsys):
    run = minbert.fit(
        recipe="smart-pcgrad",
        **file_and_data(shared),
        smart={"lambda_s": 0.5},
        heads={"sts": "cosine"},
        steps=np.int64(2),
        out=tmp_path / "run",
    )
    assert isinstance(run, Run)
    assert run.path == tmp_path / "run"
    assert_equal_runs(by_command, run.path)
    assert run.config() == Run(by_command).config().replace(out=str(run.path))
    assert f"run directory: {run.path}\n" in capsys.readouterr().out


def test_a_config_gives_the_run_of_the_command(by_command, tmp_path, capsys):
    config = Run(by_command).config().replace(out=str(tmp_path / "run"))
    assert_equal_runs(by_command, minbert.fit(config, quiet=True).path)
    assert capsys.readouterr().out == ""


def test_options_stand_over_the_file_and_the_file_over_the_recipe(options, tmp_path):
    (tmp_path / "options.yaml").write_text("{recipe: gse, batch_size: 4, seed: 3}")
    config = minbert.fit(**{**options, "config": tmp_path / "options.yaml", "batch_size": 6}, quiet=True).config()
    assert (config.batch_size, config.seed, config.surgery, config.recipe) == (6, 3, "gse", "gse")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"smart": {"lambda_s": 0.25}}, ["--smart.lambda-s=0.25"]),
        ({"smart": SmartConfig(lambda_s=0.25)}, ["--smart.lambda-s=0.25"]),
        ({"smart.lambda_s": 0.25}, ["--smart.lambda-s=0.25"]),
        ({"tasks": ("sst", "sts"), "lr": np.float32(0.5)}, ["--tasks=sst,sts", "--lr=0.5"]),
        ({"data": Path("a") / "b", "patience": None, "recipe": None, "config": None}, ["--data=a/b"]),
        ({"batch_size": {"sst": 2, "sts": np.int32(3)}, "tasks": ["sst", "sts"]}, []),
    ],
)
def test_values_of_python_are_those_of_the_command_line(given, words):
    with patch("minbert.train.train_here") as trained:
        minbert.fit(**given)
    (config, _), _ = trained.call_args
    words = words or ["--batch-size={sst: 2, sts: 3}", "--tasks=sst,sts"]
    assert config == minbert.cli.parse_layers("train", TrainConfig, words)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochz": 3}, r"unknown option epochz \(did you mean 'epochs'\?\)"),
        ({"smart": {"lambda": 3}}, r"unknown option smart.lambda \(did you mean 'smart.lambda_s'\?\)"),
        ({"epochs": "3"}, "--epochs: expected int, got '3'"),
        ({"epochs": True}, "--epochs: expected int, got true"),
        ({"smart": 3}, "--smart: expected a record of lambda_s"),
        ({"tasks": "sst"}, "--tasks: expected list"),
        ({"lr": 5}, "--lr must be between 0 and 1, got 5"),
        ({"recipe": "smrt"}, r"unknown recipe 'smrt'"),
        ({"config": "/nowhere"}, "--config cannot read /nowhere"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"resume": True}, "no such run directory; without --resume the command starts a run"),
    ],
)
def test_a_wrong_option_is_the_commands_line(options, wrong, message):
    with pytest.raises(UserError, match=message):
        minbert.fit(**{**options, **wrong}, quiet=True)
    assert not options["out"].exists()


def test_what_is_no_config_is_named(options):
    with pytest.raises(UserError, match="fit: expected a TrainConfig or options by name, got str"):
        minbert.fit("runs/x")
    with pytest.raises(UserError, match=r"fit: got a TrainConfig and steps; give config\.replace"):
        minbert.fit(TrainConfig(), steps=2)


def test_two_runs_in_a_process_are_the_same_and_leave_nothing_behind(options, tmp_path):
    torch.manual_seed(7)
    before, threads = process_state(), threading.enumerate()
    for name in ("one", "other"):
        minbert.fit(**{**options, "out": tmp_path / name, "threads": 1, "backend": "reference"}, quiet=True)
        assert process_state() == before
        assert threading.enumerate() == threads
    assert_equal_runs(tmp_path / "one", tmp_path / "other")


def test_a_run_off_the_main_thread_is_the_same(options, tmp_path):
    minbert.fit(**options, quiet=True)
    found: list[object] = []

    def work() -> None:
        try:
            found.append(minbert.fit(**{**options, "out": tmp_path / "other"}, quiet=True))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(each) for each in found] == [Run]
    assert_equal_runs(tmp_path / "run", tmp_path / "other")


def test_runs_of_two_threads_are_trained_one_after_the_other(options, tmp_path):
    """What is chosen for the whole process is the choice of one run at a time."""
    alone = [{**options, "seed": seed, "backend": backend} for seed, backend in ((1, "auto"), (2, "reference"))]
    for number, each in enumerate(alone):
        minbert.fit(**{**each, "out": tmp_path / f"alone-{number}"}, quiet=True)
    together = [
        threading.Thread(target=minbert.fit, kwargs={**each, "out": tmp_path / f"together-{number}", "quiet": True})
        for number, each in enumerate(alone)
    ]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    for number in range(2):
        assert_equal_runs(tmp_path / f"alone-{number}", tmp_path / f"together-{number}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_as_it_stops_the_command(options, number):
    def on_step(info):
        if info.step == 1:
            signal.raise_signal(number)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        minbert.fit(**options, quiet=True, on_step=on_step)
    assert isinstance(stopped.value, Stopped)
    assert signal.getsignal(number) == handler
    run = minbert.fit(**options, resume=True, quiet=True)
    assert [record["step"] for record in run.records() if "loss" in record] == [1, 2]


def test_a_run_is_resumed_and_one_that_is_there_is_not_overwritten(options):
    minbert.fit(**options, quiet=True)
    with pytest.raises(UserError, match="holds a run: give --resume to continue it, or another --out"):
        minbert.fit(**options, quiet=True)
    assert minbert.fit(**{**options, "steps": 3}, resume=True, quiet=True).summary()["steps"] == 3


def test_runs_of_the_same_second_have_directories_of_their_own(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with patch("minbert.train.datetime") as clock:
        clock.datetime.now.return_value = datetime.datetime(2030, 1, 2, 3, 4, 5)
        runs = [minbert.fit(**{**options, "out": None, "steps": 1}, quiet=True) for _ in range(3)]
    name = "runs/20300102-030405"
    assert [str(run.path) for run in runs] == [name, f"{name}-2", f"{name}-3"]


def test_all_folds_are_a_cross_validation_and_one_fold_is_a_run(options, tmp_path):
    options |= {"tasks": ["sst"], "steps": 1, "folds": 2, "quiet": True}
    epochs = []
    found = minbert.fit(**options, on_epoch=epochs.append)
    assert isinstance(found, CrossValidation)
    assert [run.path.name for run in found.runs] == ["fold-1", "fold-2"]
    assert [epoch.overall for epoch in epochs] == [run.scores()["overall"] for run in found.runs]
    overall = [run.summary()["dev"]["overall"] for run in found.runs]
    assert found.summary()["dev"]["overall"]["mean"] == pytest.approx(sum(overall) / 2)
    assert repr(found) == f"CrossValidation('{tmp_path / 'run'}', 2 runs)"
    assert f"<td>{overall[1]:.3f}</td>" in found._repr_html_()
    one = minbert.fit(**{**options, "out": tmp_path / "one"}, fold=2)
    assert_equal_runs(one.path, found.runs[1].path)
    minbert.load(found.runs[1]).predict("sst", ["a film"])
    (found.runs[1].path / "summary.json").unlink()
    assert found.summary() == {}
    assert found._repr_html_().startswith("CrossValidation(")


def test_freed_memory_is_kept_while_it_trains(options):
    calls: list[tuple[int, ...]] = []
    with patch("minbert.device.ctypes.CDLL") as library, patch("minbert.device.sys.platform", "linux"):
        library.return_value.mallopt = lambda *arguments: calls.append(arguments)
        library.return_value.malloc_trim = lambda *arguments: calls.append(("trim",))
        minbert.fit(**options, quiet=True, on_step=lambda info: calls.append(("step",)))
    assert calls[:2] == [(-1, -1), (-4, 0)]
    assert calls[-4:] == [(-1, 2**26), (-3, 2**25), (-4, 65536), ("trim",)]
    assert calls[2:-4] == [("step",)] * 2
