"""The report of several runs, with published scores beside ours."""

from __future__ import annotations

import re

import pytest
from pages import Page

from minbert.report import Row, write_comparison
from minbert.report.comparison_report import columns, our_scores
from minbert.tasks import TASKS, Task


def test_a_comparison_has_published_figures_beside_ours(run, tmp_path):
    rows = [
        Row("Baseline <s>", {"sst": 0.511, "qqp": 0.75, "test": 0.3}, run, "one <em>seed</em>"),
        Row("SMART Loss w/ GSE", {"sst": None, "qqp": None}),
    ]
    page = Page(write_comparison(tmp_path / "table.html", "Paper <004>", rows))
    for words in ("Paper <004>", "Baseline <s>", "one <em>seed</em>", "SMART Loss w/ GSE", "0.511", "0.750", "test"):
        assert words in page.text
    for value in our_scores(run).values():
        assert f"{value:.3f}".replace("-", "−") in page.text
    (link,) = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert ".." in link
    assert {page.count("em"), page.count("s")} == {0}
    assert page.count("details") == 1
    assert not re.search(r"url\(|@import|https?:", page.source)


def test_the_columns_of_a_comparison():
    rows = [Row("one", {"overall": 0.6, "sst test": 0.5, "sst": 0.4}), Row("other", {"sst": 0.6}), Row("third")]
    found = columns(rows, [{}, {"sst": 0.8, "sts": 0.1}, {}])
    assert [column.name for column in found] == ["sst", "sts", "overall", "sst test"]
    assert [(column.title, column.metric) for column in found[:2]] == [
        ("SST-5 sentiment", "accuracy"),
        ("STS-B similarity", "pearson"),
    ]
    assert (found[2].metric, found[3].title) == ("", "SST-5 sentiment, test")
    one, other, third = found[0].cells
    assert (one.published_at, other.published_at, other.ours_at) == pytest.approx((0, 0.5, 1))
    assert other.difference == pytest.approx(0.2)
    assert one.difference is None
    assert (one.best_published, other.best_published, other.best_ours, third.best_ours) == (False, True, True, False)
    assert (third.published, third.ours) == (None, None)


def test_further_metrics_have_columns_and_errors_are_best_when_small():
    price = Task("price", ("text",), "price", "regression", scale=(0, 9), metrics=("mae", "pearson"), title="Price <b>")
    tasks = TASKS | {"price": price}
    scores = [{"price": 0.5, "price pearson": 0.25, "overall": 0.6}, {"price": 2.0, "price pearson": 0.75}]
    error, overall, correlation = columns([Row("one"), Row("other")], scores, tasks)
    assert [column.name for column in (error, overall, correlation)] == ["price", "overall", "price pearson"]
    assert (error.title, error.metric, correlation.title, correlation.metric) == (
        "Price <b>",
        "mae",
        "Price <b>",
        "pearson",
    )
    assert [cell.best_ours for cell in error.cells] == [True, False]
    assert [cell.best_ours for cell in correlation.cells] == [False, True]


def test_scores_by_another_metric_than_the_column_are_in_another_column():
    class Finished:
        def summary(self):
            return {"dev": {"sst": {"f1": 0.5, "accuracy": 0.25}, "own": {"f1": 0.75, "mcc": 0.0}, "overall": 0.625}}

    found = our_scores(Finished())
    assert found == {"sst f1": 0.5, "sst": 0.25, "own": 0.75, "own mcc": 0.0, "overall": 0.625}
