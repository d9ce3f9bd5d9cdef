"""--patience: when training stops, what the run says of it, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from compare_runs import assert_equal_runs, interrupted

from minbert import train
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.runs.progress_counters import DevScores
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS

SCORES = [0.5, 0.7, 0.6, 0.7, 0.65, 0.8]  # of the epochs; equal is no improvement
OPTIONS = ["--epoch-length=2", "--epochs=6", "--smart.lambda-s=0", "--dropout=0.1"]


def train_with(scores: list[float], *options: str, first: int = 0) -> int:
    """Train with these overall dev scores, the first of which is of epoch `first` (from 0) here."""
    found = iter([*scores[first:], 0.0, 0.0, 0.0])  # those of the end of the run are not recorded

    def evaluate(model, tasks, *rest, **options):
        return {"sst": {"accuracy": next(found)}}, dict.fromkeys(task.name for task in tasks)

    with (
        patch("minbert.training.training_run.evaluate", evaluate),
        patch("minbert.training.training_run.write_predictions"),
        patch("minbert.training.training_run.write_report"),
    ):
        return train.main([*options])


def epochs_of(run: Path) -> int:
    return len(json.loads((run / "last" / "progress.json").read_text())["dev"])


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (3, 5), (4, 6), (None, 6)])
def test_training_stops_after_so_many_epochs_without_improvement(patience, epochs, quick, tmp_path, capsys):
    options = [*quick, *OPTIONS, *([f"--patience={patience}"] if patience else [])]
    assert train_with(SCORES, *options) == 0
    assert epochs_of(tmp_path / "run") == epochs
    summary = Run(tmp_path / "run").summary()
    assert (summary["stopped_early"], summary["steps"]) == (epochs < 6, 2 * epochs)
    waited = "1 epoch" if patience == 1 else f"{patience} epochs"
    line = f"the overall dev score has not improved for {waited}: training stops after step {2 * epochs} of 12"
    assert (line in capsys.readouterr().out) == (epochs < 6)


def test_a_run_that_stopped_does_nothing_more_and_goes_on_with_more_patience(quick, tmp_path, capsys):
    assert train_with(SCORES, *quick, *OPTIONS, "--patience=1") == 0
    before = (tmp_path / "run" / "last" / "manifest.json").read_bytes()
    assert train_with(SCORES, *quick, *OPTIONS, "--patience=1", "--resume", first=3) == 0
    assert (tmp_path / "run" / "last" / "manifest.json").read_bytes() == before
    assert Run(tmp_path / "run").summary()["stopped_early"]
    assert train_with(SCORES, *quick, *OPTIONS, "--patience=2", "--resume", first=3) == 0
    assert epochs_of(tmp_path / "run") == 4
    assert train_with(SCORES, *quick, *OPTIONS, "--resume", first=4) == 0
    assert epochs_of(tmp_path / "run") == 6
    assert not Run(tmp_path / "run").summary()["stopped_early"]

    straight = ["--out", str(tmp_path / "straight")]
    assert train_with(SCORES, *quick, *OPTIONS, *straight) == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")
    capsys.readouterr()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupted_run_stops_where_an_uninterrupted_one_does(call, quick, tmp_path):
    """With real scores, of a rate at which they soon fall."""
    options = [*quick, *OPTIONS, "--patience=1", "--lr=0.3", "--warmup=0", "--checkpoint-steps=1"]
    assert train.main([*options, "--out", str(tmp_path / "straight")]) == 0
    stopped = Run(tmp_path / "straight").summary()
    assert stopped["stopped_early"]
    assert stopped["steps"] > call
    with interrupted("minbert.training.loop.training_step", call):
        train.main(options)
    assert train.main([*options, "--resume"]) == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")
    again = Run(tmp_path / "run").summary()
    assert [again[name] for name in ("steps", "dev", "best_epoch")] == [
        stopped[name] for name in ("steps", "dev", "best_epoch")
    ]


def test_the_count_starts_again_with_each_improvement():
    scores, tasks = DevScores(), [TASKS["sst"]]
    waited = []
    for epoch, value in enumerate(SCORES, 1):
        scores.add(epoch, {"sst": {"accuracy": value}}, tasks)
        waited.append(scores.epochs_since_best)
    assert waited == [0, 0, 1, 2, 3, 0]


def test_no_patience_at_all_is_refused():
    with pytest.raises(UserError, match="--patience must be at least 1, got 0"):
        TrainConfig(patience=0)
