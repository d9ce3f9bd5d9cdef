"""`minbert.Run`: what it reads of a run directory, finished or not, and how a notebook shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from groups import quick_options

import minbert
from minbert import UserError, train

FIXTURE = Path(__file__).parent / "fixtures" / "run-0.1.0" / "run"


@pytest.fixture(scope="module")
def finished(course_data, tmp_path_factory) -> minbert.Run:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([*quick_options(course_data, path), "--lr=0.01"]) == 0
    return minbert.Run(path)


@pytest.fixture
def run(finished, tmp_path) -> minbert.Run:
    """A copy, to be changed."""
    return minbert.Run(shutil.copytree(finished.path, tmp_path / "run"))


def test_its_records_are_the_lines_of_metrics_jsonl(finished):
    lines = (finished.path / "metrics.jsonl").read_text().splitlines()
    assert finished.records() == [json.loads(line) for line in lines]
    assert len(lines) == 14


def test_its_frame_has_a_column_for_each_number(finished):
    pandas = pytest.importorskip("pandas")
    frame = finished.frame()
    assert isinstance(frame, pandas.DataFrame)
    records = finished.records()
    assert frame["step"].tolist() == [record["step"] for record in records]
    assert frame["loss.sst"].dropna().tolist() == [record["loss"]["sst"] for record in records if "loss" in record]
    dev = frame.dropna(subset="dev.overall")
    assert dev["dev.sts.pearson"].tolist() == [epoch.metrics["sts"]["pearson"] for epoch in finished.epochs()]


def test_a_frame_without_pandas_is_one_line(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"Run.frame needs the package pandas: pip install 'minbert\[notebook\]'"):
        finished.frame()


def test_its_scores_are_those_of_the_best_epoch(finished, run):
    epochs, summary = finished.epochs(), finished.summary()
    assert [epoch.epoch for epoch in epochs] == [1, 2]
    best = epochs[summary["best_epoch"] - 1]
    assert finished.scores() == {**best.metrics, "overall": best.overall} == summary["dev"]
    (run.path / "summary.json").unlink()  # as while the run goes on
    assert run.scores() == finished.scores()
    with pytest.raises(UserError, match="run has no scores on test yet, or no labels there"):
        finished.scores("test")
    with pytest.raises(UserError, match="unknown split 'train'; known: dev, test"):
        finished.scores("train")
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="run has no scores on dev yet"):
        run.scores()


def test_test_scores_are_those_of_the_best_epoch(tmp_path):
    run = minbert.fit(tasks=["sst"], steps=1, precision="fp32", scratch={"hidden_size": 16}, out=tmp_path, quiet=True)
    assert run.scores("test") == run.summary()["test"]
    assert 0 <= run.scores("test")["sst"]["accuracy"] == run.scores("test")["overall"] <= 1


def test_a_run_of_an_earlier_release_is_read():
    run = minbert.Run(FIXTURE)
    assert run.scores() == run.summary()["dev"]
    assert run.epochs()
    assert run.records()


def test_it_says_in_one_line_what_it_is(finished, run, tmp_path):
    summary = finished.summary()
    expected = f"best epoch {summary['best_epoch']}, overall {summary['dev']['overall']:.3f}"
    assert repr(run) == f"Run('{run.path}': {expected})"
    (run.path / "summary.json").write_text("damaged")
    assert repr(run) == f"Run('{run.path}': unfinished)"
    assert repr(minbert.Run(tmp_path / "none")) == f"Run('{tmp_path / 'none'}': unfinished)"


def test_a_notebook_shows_the_report_and_runs_nothing_of_it(finished, run):
    shown = finished._repr_html_()
    frame = re.fullmatch(r'<iframe srcdoc="([^"<>]*)" sandbox="" style="[^"<>]*"></iframe>', shown)
    assert html.unescape(frame[1]) == (finished.path / "report.html").read_text(encoding="utf-8")
    (run.path / "report.html").unlink()
    assert run._repr_html_() == html.escape(repr(run))


def test_a_directory_that_is_not_there_has_no_scores(tmp_path):
    with pytest.raises(UserError, match="typo: no such run directory"):
        minbert.Run(tmp_path / "typo").scores()
