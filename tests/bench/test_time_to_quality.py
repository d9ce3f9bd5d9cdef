"""bench/time_to_quality.py: its runs, what it makes of their scores, its record, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import time_to_quality
from groups import quick_options
from time_to_quality import Outcome, Schedule, main, schedules, table

from minbert.errors import UserError
from minbert.runs.run_directory import Run

SCRIPT = Path(time_to_quality.__file__)


def outcome(seed: int, final: float, met_at: int | None = None, minutes: float | None = 2.0) -> Outcome:
    return Outcome(seed, 100, final, final, met_at, step_seconds=0.5, training_minutes=1.5, minutes=minutes)


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def test_longer_schedules_are_trained_until_the_mean_of_the_final_scores_meets_the_target():
    trained = []

    def runs(recipe: str, epochs: int) -> list[Outcome]:
        trained.append((recipe, epochs))
        return [outcome(seed, 0.5 + 0.1 * epochs + 0.02 * seed) for seed in (-1, 1)]

    done = schedules(["plain", "gse"], [4, 1, 2, 3], 0.7, runs)
    assert trained == [(recipe, epochs) for recipe in ("plain", "gse") for epochs in (1, 2)]
    assert [schedule.meets for schedule in done] == [False, True, False, True]
    assert not schedules(["plain"], [1], 0.7, runs)[0].meets


def test_a_row_has_means_deviations_and_medians_over_the_seeds():
    runs = [outcome(0, 0.73, None, 3.0), outcome(1, 0.74, 100, None), outcome(2, 0.76, 50, 5.0)]
    schedule = Schedule("pcgrad", 2, 0.74, runs)
    row = schedule.row()
    assert row["final"] == pytest.approx(0.743333, abs=1e-6)
    assert row["final_deviation"] == pytest.approx(0.0152753, abs=1e-6)
    assert row["seconds"] == pytest.approx(240)  # the median of the known minutes
    assert [run["met_at"] for run in row["runs"]] == [None, 100, 50]
    assert "| pcgrad, 2 epochs | 100 | 0.7433 ± 0.0153 | 0.7433 ± 0.0153 | -, 100, 50 | 0.500 | 4.0 |" in table(
        [schedule]
    )
    alone = Schedule("pcgrad", 1, 0.74, runs[:1])
    assert (alone.row()["final_deviation"], alone.meets) == (None, False)
    assert "- pcgrad, 1 epoch does not meet 0.74 with one seed." in table([alone])


@pytest.mark.slow
def test_runs_are_trained_once_and_recorded(course_data, tmp_path):
    own = quick_options(course_data, tmp_path)
    rest = [option for option in own if option.split("=")[0] not in ("--data", "--out", "--recipe", "--epochs")]
    given = ["--data", course_data, "--recipes", "plain", "--seeds", "0,1", "--runs", tmp_path / "runs"]
    given += ["--results", tmp_path / "results", "--epochs", "2"]
    runs = [Run(tmp_path / "runs" / "plain" / "epochs-2" / f"seed-{seed}") for seed in (0, 1)]

    done = script(*given, "--target", "0.999", "--", *rest)
    assert (done.returncode, done.stderr) == (0, "")
    assert "- plain, 2 epochs does not meet 0.999 in the mean of 2 seeds." in done.stdout
    (path,) = (tmp_path / "results").glob("*.json")
    record = json.loads(path.read_text())
    assert {"time", "commit", "machine", "versions"} < record.keys()
    (row,) = record["rows"]
    for run, found in zip(runs, row["runs"], strict=True):
        scores = [line["dev"]["overall"] for line in run.metrics.records() if "dev" in line]
        assert len(scores) == 2
        assert (found["final"], found["best"], found["met_at"]) == (scores[-1], max(scores), None)
        assert found["steps"] == run.summary()["steps"]
        assert found["minutes"] > found["training_minutes"] == run.summary()["seconds"] / 60
    assert "| plain, 2 epochs |" in path.with_suffix(".md").read_text()

    path.unlink()
    before = [run.metrics.path.stat().st_mtime_ns for run in runs]
    done = script(*given, "--target", "0.001", "--", *rest)
    assert "- plain, 2 epochs is the shortest schedule that meets 0.001 in the mean of 2 seeds." in done.stdout
    assert [run.metrics.path.stat().st_mtime_ns for run in runs] == before
    (path,) = (tmp_path / "results").glob("*.json")
    (again,) = json.loads(path.read_text())["rows"]
    assert [found["minutes"] for found in again["runs"]] == [found["minutes"] for found in row["runs"]]
    assert [found["met_at"] for found in again["runs"]] == [row["runs"][0]["steps"] // 2] * 2

    with pytest.raises(UserError, match=r"seed-0 holds a run with other options: --lr .*; give another --runs$"):
        main([*map(str, given), "--", *rest, "--lr=0.01"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "plane"], "unknown recipe 'plane' (did you mean 'plain'?)"),
        (["--seeds", "0,one"], "argument --seeds: invalid list of int value: '0,one'"),
        (["--seeds", "1,1"], "--seeds must be a list without repetitions, got 1,1"),
        (["--epochs", "0,1"], "--epochs must be at least 1, got 0"),
        (["--target", "74"], "--target must be between 0 and 1, got 74"),
        (["--speed"], "unrecognized arguments: --speed; --help lists the options"),
        (["--", "--seed", "4"], "--seed after --: this script gives it to every run"),
        (["--", "--lrate", "1e-4"], "unknown option --lrate"),
    ],
)
def test_bad_input_is_refused_before_the_first_run(arguments, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_what_training_refuses_is_one_line_and_exit_code_2(tmp_path):
    arguments = ["--runs", tmp_path / "runs", "--results", tmp_path / "results", "--recipes", "plain"]
    done = script(*arguments, "--data", tmp_path / "nothing")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*nothing.*\n", done.stderr)
    assert not [*(tmp_path / "results").iterdir()]


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("data", "recipes", "seeds", "target", "epochs", "runs", "results"))
