"""Predictions, scores against scikit-learn and scipy, thresholds, and the overall score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics

from minbert.methods.losses import LOSSES
from minbert.tasks import TASKS, Task
from minbert.tasks.metrics import (
    THRESHOLD,
    overall,
    predictions,
    probabilities,
    score,
    unit,
    with_thresholds,
)
from minbert.tasks.task import ERRORS, METRICS, METRICS_OF

AVERAGES = {"f1_micro": "micro", "f1_macro": "macro"}


def own_task(type_: str, classes: int = 3, **fields) -> Task:
    """A task with every metric of its type."""
    names = None if type_ == "regression" else tuple(f"class {number}" for number in range(classes))
    return Task("own", ("text",), "label", type_, classes=names, metrics=METRICS_OF[type_], **fields)


def draws(task: Task, examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Head outputs in float32, and labels, of which the outputs know a little."""
    generator = np.random.default_rng(seed)
    if task.is_multilabel:
        labels = (generator.random((examples, task.num_classes)) < 0.3).astype(np.float32)
        return (labels + generator.normal(-0.5, 1, labels.shape)).astype(np.float32), labels
    if task.is_regression:
        labels = generator.uniform(0, 5, examples).astype(np.float32)
        return (labels + generator.normal(0, 1, examples)).astype(np.float32), labels
    labels = generator.integers(0, task.num_classes, examples)
    if task.num_classes == 2:
        outputs = labels - 0.5 + generator.normal(0, 1, examples)
    else:
        outputs = 2 * np.eye(task.num_classes)[labels] + generator.normal(0, 1, (examples, task.num_classes))
    return outputs.astype(np.float32), labels.astype(np.float32)


# Predictions and probabilities -------------------------------------------------------------------------------------


def test_every_task_names_a_loss_and_metrics_that_exist():
    for task in TASKS.values():
        assert task.loss in LOSSES
        assert set(task.metrics) <= set(METRICS_OF[task.type])
        assert task.num_outputs == (task.num_classes if task.num_classes > 2 else 1)


def test_predictions_of_each_kind():
    assert predictions(TASKS["sst"], np.array([[0, 1, 5, 2, 1], [9, 0, 0, 0, 0]])).tolist() == [2, 0]
    assert predictions(TASKS["qqp"], np.array([-0.5, 0.5])).tolist() == [0, 1]
    assert predictions(TASKS["sts"], np.array([0.25, 7.0])).tolist() == [0.25, 7.0]
    several = np.array([[-0.1, 0.1, 2.0], [-1.0, -2.0, -3.0]])
    assert predictions(own_task("multilabel"), several).tolist() == [[0, 1, 1], [0, 0, 0]]
    assert predictions(own_task("multilabel", thresholds=(0.4, 0.6, 0.95)), several).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_probabilities_are_shares_of_one_but_for_several_labels():
    outputs, _ = draws(own_task("classification", 77), 20, 0)
    found = probabilities(own_task("classification", 77), outputs)
    assert found.shape == (20, 77)
    assert found.sum(1) == pytest.approx(np.ones(20))
    assert (found.argmax(1) == outputs.argmax(1)).all()
    found = probabilities(own_task("classification", 2), np.array([0.0, 3.0, -800.0], np.float32))
    assert found == pytest.approx(np.array([[0.5, 0.5], [1 / (1 + np.e**3), 1 / (1 + np.e**-3)], [1, 0]]))
    found = probabilities(own_task("multilabel", 2), np.array([[0.0, 3.0]], np.float32))
    assert found == pytest.approx(np.array([[0.5, 1 / (1 + np.e**-3)]]))
    assert probabilities(own_task("regression"), np.array([1.0])) is None


# Scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5, 77])
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_classes_are_scikit_learns(classes, seed):
    task = own_task("classification", classes)
    outputs, labels = draws(task, 400, seed)
    truth = labels.astype(int)
    predicted, shares = predictions(task, outputs), probabilities(task, outputs)
    found = score(task, predicted, labels, shares)
    assert list(found) == list(METRICS_OF["classification"])
    average = "binary" if classes == 2 else "macro"
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert found["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(truth, predicted))
    assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(truth, predicted, average=average))
    for name, average in AVERAGES.items():
        assert found[name] == pytest.approx(sklearn_metrics.f1_score(truth, predicted, average=average))
    present = np.flatnonzero(np.bincount(truth, minlength=classes))
    assert len(present) > 0.9 * classes
    one_hot = np.eye(classes)[truth]
    for name, function in (
        ("roc_auc", sklearn_metrics.roc_auc_score),
        ("average_precision", sklearn_metrics.average_precision_score),
    ):
        columns = [1] if classes == 2 else present
        expected = np.mean([function(one_hot[:, column], shares[:, column]) for column in columns])
        assert found[name] == pytest.approx(expected)
    if len(present) == classes > 2:
        macro = sklearn_metrics.roc_auc_score(truth, shares, multi_class="ovr", average="macro")
        assert found["roc_auc"] == pytest.approx(macro)


@pytest.mark.parametrize("classes", [1, 4, 77])
def test_scores_of_several_labels_are_scikit_learns(classes):
    task = own_task("multilabel", classes)
    outputs, labels = draws(task, 300, classes)
    predicted, shares = predictions(task, outputs), probabilities(task, outputs)
    found = score(task, predicted, labels, shares)
    assert list(found) == list(METRICS_OF["multilabel"])
    assert found["accuracy"] == pytest.approx((predicted == labels).all(axis=1).mean())  # all labels of an example
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert found["f1"] == found["f1_macro"]
    for name, average in AVERAGES.items():
        assert found[name] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average=average))
    assert found["roc_auc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, shares, average="macro"))
    expected = sklearn_metrics.average_precision_score(labels, shares, average="macro")
    assert found["average_precision"] == pytest.approx(expected)


@pytest.mark.parametrize("scale", [(0, 5), (1, 5), (-100, 1000)])
def test_scores_of_a_regression_are_scipys_and_its_errors_in_the_users_units(scale):
    task = own_task("regression", scale=scale)
    predicted, labels = draws(task, 300, 1)
    low, high = scale
    theirs = [low + each.astype(np.float64) / 5 * (high - low) for each in (predicted, labels)]
    found = score(task, predicted, labels)
    assert found["pearson"] == pytest.approx(stats.pearsonr(*theirs).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(*theirs).statistic)
    assert found["mse"] == pytest.approx(sklearn_metrics.mean_squared_error(*theirs))
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(*theirs))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=50), st.floats(0.1, 10), st.floats(-5, 5))
def test_pearson_is_one_under_scaling_and_shift(values, scale, shift):
    x = np.array(values)
    if np.ptp(x) < 1e-3:
        return
    assert score(TASKS["sts"], x, scale * x + shift)["pearson"] == pytest.approx(1.0, abs=1e-6)


def test_a_score_that_is_not_defined_is_zero():
    constant, rising = np.ones(3), np.arange(3.0)
    for pair in ((constant, rising), (rising, constant), (rising[:1], rising[:1])):
        assert score(TASKS["sts"], *pair) == {"pearson": 0.0, "spearman": 0.0}
    two = own_task("classification", 2)
    found = score(two, np.zeros(4, np.int64), np.zeros(4), np.full((4, 2), 0.5))  # no example of the second class
    assert (found["accuracy"], found["f1"], found["mcc"], found["roc_auc"], found["average_precision"]) == (
        1,
        0,
        0,
        0,
        0,
    )
    several = own_task("multilabel")
    nothing = np.zeros((4, 3))
    found = score(several, nothing, nothing, nothing)
    assert found == {
        "accuracy": 1.0,
        **dict.fromkeys(("f1_micro", "f1_macro", "f1", "roc_auc", "average_precision"), 0),
    }


def test_a_class_without_examples_does_not_enter_the_mean_over_classes():
    task = own_task("classification", 3)
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0])
    assert score(task, predicted, labels)["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert score(task, np.array([0, 0, 1, 2]), labels)["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_without_probabilities_an_area_is_that_of_the_predictions():
    task = own_task("classification", 2)
    outputs, labels = draws(task, 100, 3)
    predicted = predictions(task, outputs)
    assert score(task, predicted, labels)["roc_auc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, predicted))


# Thresholds --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 40), st.booleans())
def test_no_threshold_has_a_better_f1_on_the_examples_it_was_chosen_on(seed, examples, tied):
    task = own_task("multilabel", 4)
    outputs, labels = draws(task, examples, seed)
    outputs = outputs.round() if tied else outputs
    chosen = with_thresholds(task, outputs, labels)
    shares = probabilities(task, outputs)
    assert len(chosen.thresholds) == 4
    for column, threshold in enumerate(chosen.thresholds):
        of_class, truth = shares[:, column], labels[:, column]
        if not truth.any():
            assert threshold == THRESHOLD
            continue
        found = sklearn_metrics.f1_score(truth, of_class > threshold)
        others = [2 * (truth @ (of_class > each)) / (truth.sum() + (of_class > each).sum()) for each in (0, *of_class)]
        assert found == pytest.approx(max(others))
        assert 0 <= threshold < 1
        assert threshold not in of_class
    assert (predictions(chosen, outputs) == (shares > np.array(chosen.thresholds))).all()


def test_thresholds_lie_between_probabilities_and_other_tasks_have_none():
    task = own_task("multilabel", 2)
    outputs = np.log(
        np.array([[0.2, 0.9], [0.3, 0.8], [0.6, 0.7]]) / (1 - np.array([[0.2, 0.9], [0.3, 0.8], [0.6, 0.7]]))
    )
    chosen = with_thresholds(task, outputs, np.array([[0, 1], [1, 0], [1, 0]]))
    assert chosen.thresholds == pytest.approx((0.25, 0.85))
    assert chosen == replace(task, thresholds=chosen.thresholds)
    assert with_thresholds(TASKS["sst"], np.zeros((2, 5)), np.zeros(2)) is TASKS["sst"]


# The overall score -------------------------------------------------------------------------------------------------


def test_overall_is_the_leaderboards_formula_and_leaves_cfimdb_out():
    scores = {"sst": {"accuracy": 0.5}, "qqp": {"accuracy": 0.8, "f1": 0.1}, "sts": {"pearson": 0.6, "spearman": 0.2}}
    tasks = list(TASKS.values())
    assert overall(scores, tasks) == pytest.approx((0.5 + 0.8 + (0.6 + 1) / 2) / 3)
    assert overall({**scores, "cfimdb": {"accuracy": 1.0}}, tasks) == overall(scores, tasks)
    assert overall({"cfimdb": {"accuracy": 0.9}}, tasks) == pytest.approx(0.9)


@pytest.mark.parametrize("metric", METRICS)
def test_overall_is_of_first_metrics_between_0_and_1_without_errors(metric):
    type_ = next(each for each, names in METRICS_OF.items() if metric in names)
    own = replace(own_task(type_), metrics=(metric,))
    scores = {"sst": {"accuracy": 0.5}, "own": {metric: 0.25}}
    expected = 0.5 if metric in ERRORS else (0.5 + (1.25 / 2 if metric in ("mcc", "pearson", "spearman") else 0.25)) / 2
    assert overall(scores, [TASKS["sst"], own]) == pytest.approx(expected)
    assert 0 <= unit(metric, 0.25) <= 1
    assert overall({"own": {metric: 0.25}}, [own]) == unit(metric, 0.25)


def test_a_smaller_error_is_better():
    own = replace(own_task("regression"), metrics=("mse",))
    better, worse = (overall({"own": {"mse": value}}, [own]) for value in (0.5, 200.0))
    assert 0 < worse < better < 1
