"""Losses, metrics, schedules, seeds: small functions with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minbert.methods.losses import LOSSES
from minbert.seeds import derive_seed
from minbert.tasks import TASKS
from minbert.tasks.metrics import accuracy, overall, pearson, predictions
from minbert.training.schedule import learning_rate_factor


def test_losses_are_means_over_the_batch():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    expected = (-math.log(3 / 4) + math.log(2)) / 2
    assert LOSSES["cross_entropy"](logits, torch.tensor([1.0, 0.0])).item() == pytest.approx(expected, rel=1e-6)
    one = LOSSES["binary_cross_entropy"](torch.tensor([math.log(3.0), 0.0]), torch.tensor([1.0, 0.0]))
    assert one.item() == pytest.approx(expected, rel=1e-6)
    assert LOSSES["mean_squared_error"](torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0])).item() == 2.0


def test_losses_are_computed_in_float32():
    for name, shape in (("cross_entropy", (4, 3)), ("binary_cross_entropy", (4,)), ("mean_squared_error", (4,))):
        assert LOSSES[name](torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(4)).dtype == torch.float32


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


def test_learning_rate_rises_then_falls_to_zero_or_stays():
    linear = [learning_rate_factor(step, 100, 0.1, "linear") for step in range(100)]
    assert linear[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(linear) == 1.0
    assert linear[10:] == pytest.approx([(100 - i) / 90 for i in range(10, 100)])
    assert [learning_rate_factor(step, 100, 0.1, "constant") for step in (0, 9, 50, 99)] == [0.1, 1.0, 1.0, 1.0]
    assert learning_rate_factor(0, 1, 0.0, "linear") == 1.0


def test_seeds_are_pinned_and_distinct():
    assert derive_seed(0, "dropout", 1) == 2207888992241755396
    seeds = {derive_seed(seed, what, step) for seed in range(10) for what in ("dropout", "data") for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
