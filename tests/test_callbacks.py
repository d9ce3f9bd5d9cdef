"""`on_step` and `on_epoch`: what they are told, how they stop a run, and what an error in one leaves."""

from __future__ import annotations

import dataclasses
import subprocess
import textwrap
from unittest.mock import patch

import numpy as np
import pytest
from compare_runs import assert_equal_runs
from groups import SMALL, command

import minbert
from minbert.runs.run_directory import Run


@pytest.fixture
def options(course_data, tmp_path) -> dict[str, object]:
    """Of a run of twelve steps in two epochs."""
    return {**SMALL, "data": course_data, "out": tmp_path / "run", "epochs": 2, "quiet": True, "recipe": "pcgrad"}


def test_they_are_told_what_the_run_records(options):
    steps, epochs = [], []
    run = minbert.fit(**options, on_step=steps.append, on_epoch=epochs.append)
    records = run.records()
    logged = [record for record in records if "loss" in record]
    assert [(info.step, info.epoch) for info in steps] == [(step, 1 + (step > 6)) for step in range(1, 13)]
    for info, record in zip(steps, logged, strict=True):
        names = ("step", "epoch", "loss", "lr", "examples_per_second")
        assert dataclasses.astuple(info) == tuple(record[name] for name in names)
    for info, record in zip(epochs, (record for record in records if "dev" in record), strict=True):
        assert (info.epoch, info.step, info.train_losses) == (record["epoch"], record["step"], record["train_loss"])
        assert {**info.dev, "overall": info.overall} == record["dev"]
    assert [info.step for info in epochs] == [6, 12]
    with pytest.raises(dataclasses.FrozenInstanceError):
        steps[0].step = 3


def test_they_do_not_change_the_run(options, tmp_path):
    minbert.fit(**options)

    def meddle(info):
        info.losses.clear() if isinstance(info, minbert.StepInfo) else info.dev.clear()
        return 1, "True", None, [True]  # none of these is True

    minbert.fit(**{**options, "out": tmp_path / "other"}, on_step=meddle, on_epoch=meddle)
    assert_equal_runs(tmp_path / "run", tmp_path / "other")
    assert Run(tmp_path / "run").scores() == Run(tmp_path / "other").scores()


@pytest.mark.parametrize(("at", "true"), [(1, True), (4, np.True_), (6, True), (7, True), (12, True)])
def test_a_step_stops_the_run_which_ends_whole(at, true, options, tmp_path):
    """In an epoch, at the end of one, and at the end of the run, which nothing is left to stop."""
    epochs = []
    run = minbert.fit(**options, on_step=lambda info: true if info.step == at else None, on_epoch=epochs.append)
    summary = run.summary()
    assert (summary["steps"], summary["stopped_early"]) == (at, at < 12)
    assert [info.step for info in epochs] == [step for step in (6, 12) if step < at] + [at]
    assert run.scores()["overall"] == max(info.overall for info in epochs)
    assert (run.path / "report.html").exists()
    for checkpoint in ("best", "last"):
        assert minbert.load(run.path / checkpoint).predict("sst", ["a good film"])
    goes_on = minbert.fit(**options, resume=True)
    straight = minbert.fit(**{**options, "out": tmp_path / "straight"})
    assert_equal_runs(straight.path, goes_on.path)
    assert not goes_on.summary()["stopped_early"]


def test_an_epoch_stops_the_run(options):
    infos = []
    run = minbert.fit(**options, on_epoch=lambda info: infos.append(info) or info.overall > 0)
    assert [info.step for info in infos] == [6]
    assert (run.summary()["steps"], run.summary()["stopped_early"]) == (6, True)
    assert len(run.epochs()) == 1


def test_the_terminal_says_what_stopped_it(options, capsys):
    minbert.fit(**{**options, "quiet": False}, on_step=lambda info: info.step == 4)
    assert "a callback returned True: training stops after step 4 of 12\n" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("which", ["on_step", "on_epoch"])
def test_an_error_is_raised_and_the_run_goes_on_from_there(which, error, options, tmp_path, capsys):
    raised = error("of the user's")

    def fails(info):
        if info.step in (4, 6):
            raise raised

    with pytest.raises(error) as found:
        minbert.fit(**{**options, "quiet": False}, **{which: fails})
    assert found.value is raised
    step = 4 if which == "on_step" else 6
    line = f"a callback raised an error; {tmp_path / 'run' / 'last'} holds step {step}: the same command with --resume"
    assert line in capsys.readouterr().out
    assert not Run(tmp_path / "run").summary()
    minbert.fit(**options, resume=True)
    straight = minbert.fit(**{**options, "out": tmp_path / "straight"})
    assert_equal_runs(straight.path, tmp_path / "run")


def test_without_callbacks_nothing_is_asked(options):
    with (
        patch("minbert.training.callbacks.CallbackCalls.call", side_effect=AssertionError),
        patch("minbert.training.loop.StepInfo", side_effect=AssertionError),
    ):
        assert minbert.fit(**options).summary()["steps"] == 12


SCRIPT = """
    import os, sys
    import minbert
    main, calls = os.environ["RANK"] == "0", []
    options = {options!r}

    def stop(info):
        calls.append(info.step)
        return main and info.step == 3  # what the other ranks say does not count

    # Only the first rank has a callback, then all; a second run in the same processes; one whose callback fails.
    first = minbert.fit(**options, out="first", quiet=True, on_step=stop if main else None)
    second = minbert.fit(**options, out="second", quiet=True, on_step=stop)
    assert calls == ([1, 2, 3] * 2 if main else []), calls
    for run in (first, second):  # the files are there for every rank
        assert run.summary()["steps"] == 3, run.summary()
        assert run.summary()["stopped_early"]
    try:
        minbert.fit(**options, out="third", quiet=True, on_step=lambda info: 1 / 0)
    except (ZeroDivisionError, RuntimeError) as error:
        sys.stdout.write(f"rank {{os.environ['RANK']}} {{type(error).__name__}}\\n")  # in one write: both ranks' pipe
"""


@pytest.mark.slow
def test_several_processes_stop_together(options, tmp_path):
    given = {name: value for name, value in options.items() if name not in ("out", "quiet")}
    given["data"] = str(given["data"])
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT).format(options=given))
    done = subprocess.run(command(2, tmp_path / "script.py"), cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == ["rank 0 ZeroDivisionError", "rank 1 RuntimeError"]
    assert_equal_runs(tmp_path / "first", tmp_path / "second")
    assert "last holds step 1:" in Run(tmp_path / "third").where_it_stands()
