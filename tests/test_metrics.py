"""Predictions, metrics and the overall score."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.methods.losses import LOSSES
from minbert.tasks import TASKS
from minbert.tasks.metrics import accuracy, overall, pearson, predictions


def test_every_task_names_a_loss_and_a_metric_that_exist():
    for task in TASKS.values():
        assert task.loss in LOSSES
        assert task.metric in ("accuracy", "pearson")
        assert task.num_outputs == (5 if task.name in ("sst", "yelp") else 1)


def test_predictions_of_each_kind():
    assert predictions(TASKS["sst"], np.array([[0, 1, 5, 2, 1], [9, 0, 0, 0, 0]])).tolist() == [2, 0]
    assert predictions(TASKS["qqp"], np.array([-0.5, 0.5])).tolist() == [0, 1]
    assert predictions(TASKS["sts"], np.array([0.25, 7.0])).tolist() == [0.25, 7.0]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=50), st.floats(0.1, 10), st.floats(-5, 5))
def test_pearson_is_one_under_scaling_and_shift_and_agrees_with_numpy(values, scale, shift):
    x = np.array(values)
    if np.ptp(x) < 1e-3:
        return
    noisy = scale * x + shift + np.sin(np.arange(len(x)))
    assert pearson(x, scale * x + shift) == pytest.approx(1.0, abs=1e-6)
    assert pearson(x, noisy) == pytest.approx(np.corrcoef(x, noisy)[0, 1], abs=1e-6)


def test_scores_of_edge_cases():
    assert pearson(np.ones(3), np.arange(3.0)) == 0.0
    assert accuracy(np.array([1, 0, 2]), np.array([1.0, 1.0, 2.0])) == pytest.approx(2 / 3)


def test_overall_is_the_leaderboards_formula_and_leaves_cfimdb_out():
    scores = {"sst": {"accuracy": 0.5}, "qqp": {"accuracy": 0.8}, "sts": {"pearson": 0.6}}
    assert overall(scores) == pytest.approx((0.5 + 0.8 + (0.6 + 1) / 2) / 3)
    assert overall({**scores, "cfimdb": {"accuracy": 1.0}}) == overall(scores)
    assert overall({"cfimdb": {"accuracy": 0.9}}) == pytest.approx(0.9)
