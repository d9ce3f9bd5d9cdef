"""What the end of a run evaluates: the test split, and dev only if the best epoch's outputs were not kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from compare_runs import interrupted
from own_task_files import write_tasks
from several_runs import train_all

from minbert import train
from minbert.runs.checkpoint import load_tasks
from minbert.runs.predictions import write_predictions
from minbert.runs.run_directory import Run
from minbert.training.training_run import TrainingRun

# The first epoch's scores are the best.
FALLS = ("--epoch-length=2", "--epochs=6", "--smart.lambda-s=0", "--patience=1", "--lr=0.3", "--warmup=0")


@contextmanager
def watched() -> Iterator[tuple[list[str], dict[Path, np.ndarray]]]:
    """The splits that runs evaluate, and the outputs that they write, by file."""
    splits, written = list[str](), dict[Path, np.ndarray]()
    real = TrainingRun.evaluate_split

    def evaluate_split(self, model, split, **options):
        splits.append(split)
        return real(self, model, split, **options)

    def write(directory, task, split, examples, outputs):
        path = write_predictions(directory, task, split, examples, outputs)
        written[path] = outputs
        return path

    with (
        patch.object(TrainingRun, "evaluate_split", evaluate_split),
        patch("minbert.training.training_run.write_predictions", write),
    ):
        yield splits, written


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "predictions").iterdir()}


def summary(run: Path) -> list[object]:
    found = Run(run).summary()
    return [found.get(name) for name in ("dev", "test", "best_epoch", "steps", "stopped_early")]


def assert_equal_outputs(first: dict[Path, np.ndarray], second: dict[Path, np.ndarray]) -> None:
    """Equal to the bit."""
    assert first.keys() == second.keys()
    assert [path for path in first if first[path].tobytes() != second[path].tobytes()] == []


def assert_second_evaluation_gives(kept: dict[Path, np.ndarray], options: list[str], run: Path) -> None:
    """The run is resumed after its end: it evaluates best/ as loaded, and writes the same."""
    before = files(run), summary(run)
    with watched() as (splits, again):
        assert train.main([*options, "--resume"]) == 0
    assert splits == ["dev", "test"]
    assert_equal_outputs(kept, again)
    assert (files(run), summary(run)) == before


CASES = {
    "smart-pcgrad": [],
    "layers": ["--recipe=gse", "--surgery-scope=layer", "--shared-layer=transform", "--pooling=mean"],
    "frozen": ["--recipe=plain", "--mode=pretrain"],
}


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        *((precision, case) for precision in ("fp32", "bf16") for case in CASES.values()),
        ("bf16", ["--recipe=plain", "--split-master-weights"]),
    ],
)
def test_the_kept_outputs_are_those_of_a_second_evaluation(precision, options, quick, tmp_path):
    options = [*quick, *options, f"--precision={precision}"]
    with watched() as (splits, kept):
        assert train.main(options) == 0
    assert splits == [*["dev"] * len(Run(tmp_path / "run").epochs()), "test"]
    assert {path.name for path in kept} == {
        f"{name}-output.csv" for name in ("sst-dev", "sst-test", "para-dev", "sts-dev")
    }
    assert_second_evaluation_gives(kept, options, tmp_path / "run")


def test_they_are_those_of_the_best_epoch_when_it_is_not_the_last(quick, tmp_path):
    with watched() as (splits, kept):
        assert train.main([*quick, *FALLS]) == 0
    assert (summary(tmp_path / "run")[2], splits) == (1, ["dev", "dev", "test"])
    assert_second_evaluation_gives(kept, [*quick, *FALLS], tmp_path / "run")


def test_predictions_have_the_thresholds_of_the_best_epoch(shared, tmp_path):
    file = write_tasks(tmp_path / "own")
    small = next(option for option in shared[1] if option.startswith("--config="))
    options = [small, f"--tasks-file={file}", "--tasks=tags,topics", "--recipe=plain", *FALLS, "--patience=2"]
    options.append(f"--out={tmp_path / 'run'}")
    with watched() as (_, kept):
        assert train.main(options) == 0
    run = Run(tmp_path / "run")
    assert summary(run.path)[2] < len(run.epochs())
    (best,), (last,) = (load_tasks(path, run.config().chosen_tasks(["tags"])) for path in (run.best, run.last))
    assert best.thresholds != last.thresholds
    assert_second_evaluation_gives(kept, options, run.path)


def test_a_run_whose_best_epoch_an_earlier_process_scored_evaluates_it_again(quick, tmp_path):
    straight = [*quick, *FALLS, f"--out={tmp_path / 'straight'}"]
    assert train.main(straight) == 0
    with interrupted("minbert.training.loop.training_step", 3):  # in the second of two epochs
        train.main([*quick, *FALLS])
    with watched() as (splits, _):
        assert train.main([*quick, *FALLS, "--resume"]) == 0
    assert splits == ["dev", "dev", "test"]
    assert files(tmp_path / "run") == files(tmp_path / "straight")
    assert summary(tmp_path / "run") == summary(tmp_path / "straight")


def test_a_run_that_was_stopped_before_its_end_evaluates_again(quick, tmp_path):
    assert train.main([*quick, f"--out={tmp_path / 'straight'}"]) == 0
    with interrupted("minbert.training.training_run.TrainingRun.finish", 0):
        train.main(quick)
    with watched() as (splits, _):
        assert train.main([*quick, "--resume"]) == 0
    assert splits == ["dev", "test"]
    assert files(tmp_path / "run") == files(tmp_path / "straight")
    assert summary(tmp_path / "run") == summary(tmp_path / "straight")


@pytest.mark.slow
def test_several_processes_keep_them_too(shared, tmp_path):
    cases = {"smart-pcgrad": [*shared[1], "--steps=3"], "first-is-best": [*shared[1], *FALLS]}
    train_all(cases, 2, tmp_path / "runs")
    for name, options in cases.items():
        run = tmp_path / "runs" / name
        before = files(run), summary(run)
        with watched() as (splits, _):
            assert train.main([*options, f"--out={run}", "--resume"]) == 0
        assert splits == ["dev", "test"]
        assert (files(run), summary(run)) == before


def test_evaluating_says_every_ten_seconds_how_far_it_is(quick, monkeypatch, capsys):
    monkeypatch.setattr("minbert.console.SECONDS_BETWEEN_LINES", 0.0)
    assert train.main([*quick, "--steps=1"]) == 0
    shown = capsys.readouterr().out
    assert "\ndev: 72 examples, " in shown
    assert re.search(r"\ndev: \d+ of 72 examples, \d+ tokens in ", shown)
    assert re.search(r"\ntest: \d+ ", shown)
