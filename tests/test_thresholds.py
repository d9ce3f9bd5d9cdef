"""Thresholds of several labels: chosen on dev at the end of an epoch, kept in checkpoints, used for every split."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from compare_runs import interrupted
from own_task_files import write_tasks
from sklearn.metrics import f1_score

from minbert import evaluate, predict, train
from minbert.errors import UserError
from minbert.runs.predictions import PredictedExample
from minbert.runs.run_directory import Run

OPTIONS = ["--tasks=tags,topics", "--epochs=3", "--epoch-length=2", "--lr=1e-3", "--recipe=plain"]


@pytest.fixture(scope="module")
def options(shared, tmp_path_factory) -> list[str]:
    file = write_tasks(tmp_path_factory.mktemp("own"))
    small = next(option for option in shared[1] if option.startswith("--config="))
    return [small, f"--tasks-file={file}", *OPTIONS]


@pytest.fixture(scope="module")
def run(options, tmp_path_factory) -> Run:
    """A finished run."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([*options, f"--out={path}"]) == 0
    return Run(path)


def thresholds(checkpoint: Path) -> list[float] | None:
    """Those of the tags in a checkpoint."""
    tasks = yaml.safe_load((checkpoint / "tasks.yaml").read_text(encoding="utf-8"))["tasks"]
    assert "thresholds" not in tasks["topics"]
    return tasks["tags"].get("thresholds")


def predictions(run: Run, split: str) -> list[PredictedExample]:
    (task,) = run.config().chosen_tasks(["tags"])
    found = run.predictions(task, split)
    assert found
    return found


def test_they_are_the_best_ones_of_the_best_epochs_dev_scores(run):
    found, saved = predictions(run, "dev"), thresholds(run.best)
    shares, labels, predicted = (
        np.array([getattr(each, name) for each in found]) for name in ("probabilities", "label", "predicted")
    )
    assert (predicted == (shares > np.array(saved))).all()
    assert run.summary()["dev"]["tags"]["f1_micro"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    for number, threshold in enumerate(saved):
        here = f1_score(labels[:, number], shares[:, number] > threshold)
        others = [f1_score(labels[:, number], shares[:, number] > each) for each in (0.5, *shares[:, number])]
        assert here == pytest.approx(max(others))
    assert saved != [0.5] * len(saved)


def test_evaluating_the_train_split_does_not_choose_others(run, capsys):
    before = thresholds(run.best)
    for split in ("train", "dev"):
        assert evaluate.main([str(run.path), f"--split={split}", "--tasks=tags"]) == 0
        for each in predictions(run, split):
            assert each.predicted == [
                int(share > least) for share, least in zip(each.probabilities, before, strict=True)
            ]
    assert thresholds(run.best) == before
    assert f"{run.summary()['dev']['tags']['f1_micro']:.3f}" in capsys.readouterr().out


def test_predict_uses_them(run, tmp_path, capsys):
    """With one above 1 but for the second class, no other class is predicted."""
    path = run.best / "tasks.yaml"
    kept = path.read_text(encoding="utf-8")
    (tmp_path / "input.txt").write_text("film rose leaf\nplot sky\n")
    saved = yaml.safe_load(kept)
    classes = saved["tasks"]["tags"]["classes"]
    saved["tasks"]["tags"]["thresholds"] = [1.0, 0.0, 1.0, 1.0]
    path.write_text(yaml.safe_dump(saved))
    try:
        with patch("minbert.inference.verify"):  # of a checkpoint as it was written
            assert predict.main([str(run.path), "--task=tags", f"--input={tmp_path / 'input.txt'}"]) == 0
    finally:
        path.write_text(kept, encoding="utf-8")
    rows = [line.split(",")[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["0", classes[1]], ["1", classes[1]]]


def test_a_split_that_own_tasks_lack_is_refused_with_what_helps(run):
    with pytest.raises(UserError, match=r"no test split of tags, topics; --split and --tasks-file choose another$"):
        evaluate.main([str(run.path), "--split=test"])


def test_a_changed_tasks_file_of_a_checkpoint_is_refused(run, tmp_path):
    path = run.best / "tasks.yaml"
    kept = path.read_text(encoding="utf-8")
    path.write_text(kept.replace("multilabel", "classification"), encoding="utf-8")
    try:
        with pytest.raises(UserError, match=r"tasks\.yaml"):
            evaluate.main([str(run.path)])
    finally:
        path.write_text(kept, encoding="utf-8")


def test_a_resumed_run_keeps_them_until_it_chooses_again(options, run, tmp_path):
    options = [*options, f"--out={tmp_path / 'run'}", "--checkpoint-steps=1"]
    with patch("minbert.training.training_run.TrainingRun.finish"):
        with interrupted("minbert.training.loop.training_step", 3):  # in the second of three epochs
            train.main(options)
        first = thresholds(tmp_path / "run" / "last")
        assert first is not None
        with interrupted("minbert.training.loop.training_step", 1):
            train.main([*options, "--resume"])
        assert train.main([*options, "--resume"]) == 0
    for name in ("best", "last"):
        assert thresholds(tmp_path / "run" / name) == thresholds(run.path / name)


def test_a_checkpoint_before_the_first_scores_has_none(options, tmp_path):
    with interrupted("minbert.training.loop.training_step", 1):
        train.main([*options, f"--out={tmp_path / 'run'}", "--checkpoint-steps=1"])
    assert thresholds(tmp_path / "run" / "last") is None
