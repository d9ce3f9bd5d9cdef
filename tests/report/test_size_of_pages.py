"""A page stays small and readable with many classes, and with labels of which many are wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest

from minbert.report import html_page, run_report, svg_charts
from minbert.runs.predictions import PredictedExample
from minbert.runs.run_directory import Run
from minbert.tasks import Task

LIMIT = 2_000_000  # bytes
TEMPLATE = '{% import "parts.html" as parts %}{% include "task.html" %}'


def written(task: Task, predictions: list[PredictedExample], path, monkeypatch) -> str:
    """The section of a task whose predictions these are."""
    monkeypatch.setattr(Run, "predictions", lambda self, task, split: predictions)
    section = run_report.task_section(Run(path), task, "no data")
    template = html_page._environment().from_string(TEMPLATE)
    return template.render(section=section)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"{number} {'<b>name</b> ' * 16}" for number in range(count))


@pytest.mark.parametrize("classes", [77, 200, 1000])
def test_many_classes_that_are_all_confused(classes, tmp_path, monkeypatch):
    labels, predicted = np.random.default_rng(0).integers(0, classes, (2, 20_000)).tolist()
    found = [PredictedExample(str(i), predicted[i], 9, labels[i]) for i in range(len(labels))]
    page = written(Task("own", ("text",), "label", classes=names(classes)), found, tmp_path, monkeypatch)
    assert len(page.encode()) < LIMIT
    assert ("<svg" in page) == (classes <= run_report.MOST_IN_MAP)
    if classes <= run_report.MOST_IN_MAP:
        drawn = len(re.findall("<rect[^>]*fill-opacity", page))
        assert drawn == svg_charts.CELLS
        assert f"the {drawn} with the most examples are drawn" in page


@pytest.mark.parametrize("classes", [77, 1000])
def test_several_labels_that_are_mostly_wrong(classes, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    labels, predicted = (generator.random((300, classes)) < share for share in (0.02, 0.5))
    rows = zip(labels.astype(int).tolist(), predicted.astype(int).tolist(), strict=True)
    shares = np.full(classes, 0.5).tolist()
    found = [PredictedExample(str(i), guess, 9, label, shares) for i, (label, guess) in enumerate(rows)]
    task = Task("own", ("text",), "label", "multilabel", classes=names(classes))
    page = written(task, found, tmp_path, monkeypatch)
    assert len(page.encode()) < 2 * LIMIT
    lists = re.findall(r'<td class="several">(.*?)</td>', page, re.DOTALL)
    assert max(text.count("<bdi") for text in lists) == run_report.SOME
    assert "more</small>" in page


def test_labels_that_are_left_out_are_right_ones():
    task = Task("own", ("text",), "label", "multilabel", classes=names(30))
    prediction = PredictedExample("1", [1] * 20 + [0] * 10, 9, [0, 1] + [1] * 18 + [1] + [0] * 9)
    true, guess = run_report._several(task, run_report.Example(prediction))
    assert (len(true.shown), true.left_out) == (run_report.SOME, 20 - run_report.SOME)
    assert [number for number, wrong in true.shown if wrong] == [20]
    assert guess.shown[0] == (0, True)
    assert [number for number, _ in guess.shown] == list(range(run_report.SOME))
    assert run_report._several(Task("own", ("text",), "label", classes=names(3)), None) == []


def test_a_map_draws_every_cell_where_there_is_room():
    counts = np.arange(16).reshape(4, 4)
    figure = svg_charts.confusion_map("Map", counts, [f"<{name}>" for name in "abcd"], "A note.")
    assert figure.note == "A note."
    assert len(re.findall("<rect[^>]*fill-opacity", figure.svg)) == 15  # but the one with no examples
    assert "&lt;b&gt; predicted as &lt;a&gt;: 4 (18%)" in figure.svg
