"""--folds: a run for each fold, what is trained again, and the table of their scores."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest
from compare_runs import assert_close, assert_equal, assert_equal_runs, interrupted, weights
from rich.console import Console
from several_runs import train_all

from minbert import evaluate, train
from minbert.config import TrainConfig
from minbert.cross_validation import cross_validate, markdown, summarize, table
from minbert.data import open_source
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.files.schema_checks import FORMAT
from minbert.runs.run_directory import Run
from minbert.tasks import find_tasks
from minbert.training.loop import train as train_one
from minbert.training.setup import build_data

FOLDS = ["--folds=3", "--tasks=sst,sts", "--steps=2", "--smart.lambda-s=0"]


def predicted(run: Path, stem: str) -> list[str]:
    """The ids of a task's dev split."""
    lines = (run / "predictions" / f"{stem}-dev.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["id"] for line in lines]


@pytest.fixture(scope="module")
def folds(shared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("folds") / "out"
    assert train.main([*shared[1], *FOLDS, f"--out={out}"]) == 0
    return out


def test_each_example_is_held_out_once_and_a_run_records_its_fold(folds, course_data):
    assert {path.name for path in folds.iterdir()} == {"fold-1", "fold-2", "fold-3", "folds.json", "folds.md"}
    for task in find_tasks(["sst", "sts"]):
        held = [predicted(folds / f"fold-{fold}", task.name) for fold in (1, 2, 3)]
        assert all(held)
        examples = open_source(str(course_data)).load(task, "train")
        assert sorted(itertools.chain(*held)) == sorted(examples.ids)
    for fold in (1, 2, 3):
        config = Run(folds / f"fold-{fold}").config()
        assert (config.folds, config.fold, config.out) == (3, fold, str(folds / f"fold-{fold}"))


def test_the_table_has_mean_and_deviation(folds):
    record = json.loads((folds / "folds.json").read_text())
    assert [run["fold"] for run in record["runs"]] == [1, 2, 3]
    found = [Run(folds / f"fold-{fold}").summary() for fold in (1, 2, 3)]
    assert [run["dev"] for run in record["runs"]] == [summary["dev"] for summary in found]
    for task, metric in (("sst", "accuracy"), ("sts", "pearson")):
        each = [summary["dev"][task][metric] for summary in found]
        assert record["dev"][task][metric] == pytest.approx(
            {"mean": statistics.fmean(each), "deviation": statistics.stdev(each)}
        )
    assert record["dev"]["overall"]["mean"] == pytest.approx(
        statistics.fmean(summary["dev"]["overall"] for summary in found)
    )
    lines = (folds / "folds.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "|  | fold 1 | fold 2 | fold 3 | mean ± deviation |"
    names = [f"dev {task.name} {metric}" for task in find_tasks(["sst", "sts"]) for metric in task.metrics]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in (*names, "dev overall")]
    mean = record["dev"]["overall"]
    assert lines[-1].endswith(f"| {mean['mean']:.3f} ± {mean['deviation']:.3f} |")


def test_the_deviation_is_that_of_a_sample_and_the_test_split_has_one():
    scores = [0.2, 0.4, 0.9]
    summaries = {
        fold: {"dev": {"sst": {"accuracy": value, "f1": 0.5}, "overall": value}, "test": {"overall": 1.0}, "steps": 3}
        for fold, value in enumerate(scores, 1)
    }
    record = summarize(summaries)
    assert record["dev"]["sst"]["accuracy"]["mean"] == pytest.approx(0.5)
    assert record["dev"]["sst"]["accuracy"]["deviation"] == pytest.approx((0.26 / 2) ** 0.5)
    assert record["dev"]["sst"]["f1"]["deviation"] == record["test"]["overall"]["deviation"] == 0.0
    names, rows = table(record)
    assert names == ["", "fold 1", "fold 2", "fold 3", "mean ± deviation"]
    assert rows == [
        ["dev sst accuracy", "0.200", "0.400", "0.900", "0.500 ± 0.361"],
        ["dev sst f1", "0.500", "0.500", "0.500", "0.500 ± 0.000"],
        ["dev overall", "0.200", "0.400", "0.900", "0.500 ± 0.361"],
        ["test overall", "1.000", "1.000", "1.000", "1.000 ± 0.000"],
    ]
    assert markdown(names, rows).splitlines()[1] == "|---|---:|---:|---:|---:|"


def test_one_fold_alone_is_the_same_run(folds, shared, tmp_path):
    assert train.main([*shared[1], *FOLDS, "--fold=2", f"--out={tmp_path / 'alone'}"]) == 0
    assert_equal_runs(folds / "fold-2", tmp_path / "alone")
    assert predicted(tmp_path / "alone", "sst") == predicted(folds / "fold-2", "sst")


def test_another_fold_trains_other_weights(folds):
    with pytest.raises(AssertionError):
        assert_equal(weights(folds / "fold-1"), weights(folds / "fold-2"))


def test_resume_trains_what_is_missing_alone(folds, shared, tmp_path, monkeypatch, capsys):
    """A fold that has finished, one that was interrupted, and one that was never begun."""
    options = [*shared[1], *FOLDS, f"--out={tmp_path / 'out'}"]
    with interrupted("minbert.training.loop.training_step", 3):  # the second step of the second fold
        train.main([*options, "--checkpoint-steps=1"])
    first = (tmp_path / "out" / "fold-1" / "summary.json").stat().st_mtime_ns
    assert not (tmp_path / "out" / "fold-3").exists()
    trained = []
    monkeypatch.setattr(
        "minbert.cross_validation.train", lambda config, *rest: trained.append(config) or train_one(config, *rest)
    )
    assert train.main([*options, "--resume"]) == 0
    assert [(config.fold, config.resume) for config in trained] == [(2, True), (3, False)]
    assert (tmp_path / "out" / "fold-1" / "summary.json").stat().st_mtime_ns == first
    assert "fold 1 of 3, which has finished" in capsys.readouterr().out
    for fold in (1, 2, 3):
        assert_equal_runs(folds / f"fold-{fold}", tmp_path / "out" / f"fold-{fold}")
    assert (tmp_path / "out" / "folds.md").read_bytes() == (folds / "folds.md").read_bytes()


def test_resume_with_more_steps_extends_every_fold(shared, tmp_path):
    options = [*shared[1], "--folds=2", "--tasks=sst", f"--out={tmp_path / 'out'}"]
    assert train.main([*options, "--steps=1"]) == 0
    assert train.main([*options, "--steps=2", "--resume"]) == 0
    assert [Run(tmp_path / "out" / f"fold-{fold}").summary()["steps"] for fold in (1, 2)] == [2, 2]
    with pytest.raises(UserError, match=r"fold-1 was started with other options: --seed \(was 0, is 1\)"):
        train.main([*options, "--steps=2", "--seed=1", "--resume"])


def test_what_is_there_already_is_refused(folds, shared, quick, tmp_path):
    with pytest.raises(UserError, match="fold-1 holds a run: give --resume to go on, or another --out"):
        train.main([*shared[1], *FOLDS, f"--out={folds}"])
    with pytest.raises(UserError, match="no run of a fold there; without --resume the command starts them"):
        train.main([*shared[1], *FOLDS, f"--out={tmp_path / 'nothing'}", "--resume"])
    assert train.main([*quick, "--steps=1"]) == 0
    with pytest.raises(UserError, match="run holds a single run, and --folds makes a directory of runs"):
        train.main([*quick, "--folds=2"])


def test_a_fold_is_scored_again_on_its_own_dev_split(folds, course_data, capsys):
    assert evaluate.main([str(folds / "fold-2")]) == 0
    shown = capsys.readouterr().out
    assert "fold 2 of 3" in shown
    assert f"{Run(folds / 'fold-2').summary()['dev']['sst']['accuracy']:.3f}" in shown


def test_rows_made_from_held_out_examples_are_left_out(course_data, tmp_path):
    """Every training example has one such row, so that a fold has as many rows as examples."""
    (task,) = find_tasks(["sst"])
    examples = open_source(str(course_data)).load(task, "train")
    rows = zip(examples.ids, examples.texts, strict=True)
    made = tmp_path / "made.jsonl"
    made.write_text("".join(json.dumps({"id": name, "sentence": f"again {text}"}) + "\n" for name, text in rows))
    options = {"data": str(course_data), "tasks": ["sst"], "precision": "fp32", "folds": 3}
    plain = TrainConfig(**options, fold=2)
    without, added = map(build_data, (plain, plain.replace(augmented={"sst": str(made)})))
    assert len(added.train["sst"]) == 2 * len(without.train["sst"]) < 2 * len(examples)
    held = set(added.splits["dev"]["sst"].ids)
    assert held == set(without.splits["dev"]["sst"].ids)
    assert not held & set(added.train["sst"].ids)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folds": 1}, "--folds must be at least 2, got 1"),
        ({"folds": 3, "fold": 4}, "--fold must be between 1 and 3, got 4"),
        ({"folds": 3, "fold": 0}, "--fold must be at least 1, got 0"),
        ({"fold": 1}, "--fold must be given with --folds, their number, got 1"),
    ],
)
def test_values_that_do_not_fit_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        TrainConfig(**options)


def test_all_folds_are_not_one_run(course_data, tmp_path):
    config = TrainConfig(data=str(course_data), folds=3, precision="fp32", out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"--folds 3 is of several runs: minbert.cross_validation; give one's --fold"):
        train_one(config, Console(quiet=True))


@pytest.mark.parametrize("begun", [False, True])
def test_a_process_that_is_started_again_finds_the_folds(begun, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if begun:
        (tmp_path / "fold-1").mkdir()
        (tmp_path / "fold-1" / "config.yaml").touch()
    assert train.restarted(TrainConfig(folds=2, out=str(tmp_path))).resume == begun


@pytest.mark.slow
def test_several_processes_train_the_folds_of_one(folds, shared, tmp_path):
    train_all({"out": [*shared[1], *FOLDS]}, 2, tmp_path / "two")
    for fold in (1, 2, 3):
        assert_close(folds / f"fold-{fold}", tmp_path / "two" / "out" / f"fold-{fold}")
    assert json.loads((tmp_path / "two" / "out" / "folds.json").read_text())["folds"] == 3


def test_python_gets_the_table(shared, tmp_path):
    config = TrainConfig(
        data=shared[1][1].removeprefix("--data="), tasks=["sst"], steps=1, precision="fp32", folds=2, out=str(tmp_path)
    )
    record = cross_validate(config, Console(quiet=True), ProcessGroup())
    assert {"format": FORMAT, **record} == json.loads((tmp_path / "folds.json").read_text())
