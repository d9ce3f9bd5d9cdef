"""Precision, recall and F1 of classes against scikit-learn, and the classes that are confused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_fscore_support

from minbert.report.class_analysis import PAIRS, class_scores, confused_pairs, confusion
from minbert.report.error_analysis import Example, facts, groups, is_ordered, mistakes, properties, scores, shown
from minbert.runs.predictions import PredictedExample
from minbert.tasks import TASKS, Task


def own_task(type_: str, count: int = 0, **fields) -> Task:
    classes = tuple(f"class {number}" for number in range(count)) or None
    return Task("own", ("text",), "label", type_, **{"classes": classes, **fields})


def examples(predicted, labels, probabilities=None) -> list[Example]:
    shares = probabilities or [None] * len(labels)
    triples = zip(predicted, labels, shares, strict=True)
    return [Example(PredictedExample(str(i), one, 5, label, share)) for i, (one, label, share) in enumerate(triples)]


@pytest.mark.parametrize("classes", [2, 5, 77])
def test_scores_of_classes_are_scikit_learns(classes):
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, classes, 200)
    predicted = np.where(generator.random(200) < 0.6, labels, generator.integers(0, classes, 200))
    task, found = own_task("classification", classes), examples(predicted.tolist(), labels.tolist())
    check_scores(class_scores(task, found), labels, predicted, labels_of=range(classes))
    assert (confusion(task, found) == confusion_matrix(labels, predicted, labels=range(classes))).all()


@pytest.mark.parametrize("classes", [1, 4, 40])
def test_scores_of_several_labels_are_scikit_learns(classes):
    generator = np.random.default_rng(classes)
    labels, predicted = generator.random((2, 50, classes)) < 0.2
    task = own_task("multilabel", classes, thresholds=tuple(np.linspace(0.1, 0.9, classes)))
    rows = class_scores(task, examples(predicted.astype(int).tolist(), labels.astype(int).tolist()))
    assert [row.threshold for row in rows] == list(task.thresholds)
    assert {row.average_precision for row in rows} == {None}  # without probabilities
    for number, row in enumerate(rows):
        check_scores([row], labels[:, number], predicted[:, number], labels_of=[1])


def test_the_average_precision_of_a_class_is_scikit_learns():
    generator = np.random.default_rng(0)
    labels, shares = generator.random((60, 3)) < (0.5, 0.1, 0.0), generator.random((60, 3))
    found = examples((shares > 0.5).astype(int).tolist(), labels.astype(int).tolist(), shares.tolist())
    first, second, absent = class_scores(own_task("multilabel", 3), found)
    for number, row in enumerate((first, second)):
        assert row.average_precision == pytest.approx(average_precision_score(labels[:, number], shares[:, number]))
    assert (absent.average_precision, absent.recall) == (None, None)


def check_scores(rows, labels, predicted, labels_of):
    expected = precision_recall_fscore_support(labels, predicted, labels=list(labels_of), zero_division=np.nan)
    for row, precision, recall, f1, support in zip(rows, *expected, strict=True):
        assert (row.precision is None) == np.isnan(precision)
        assert (row.recall is None) == np.isnan(recall)
        if row.precision is not None:
            assert row.precision == pytest.approx(precision)
        if row.recall is not None:
            assert row.recall == pytest.approx(recall)
        assert row.f1 == pytest.approx(0.0 if np.isnan(f1) else f1)
        assert row.support == support


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50))
def test_confused_pairs_are_the_mistakes(pairs):
    predicted, labels = map(list, zip(*pairs, strict=True))
    task, found = own_task("classification", 4), examples(predicted, labels)
    confused = confused_pairs(task, found)
    assert sum(pair.examples for pair in confused) == len(mistakes(task, found))
    assert [pair.examples for pair in confused] == sorted((pair.examples for pair in confused), reverse=True)
    matrix = confusion(task, found)
    for pair in confused:
        assert pair.true != pair.predicted
        assert pair.examples == matrix[pair.true, pair.predicted]
        assert pair.share == pytest.approx(pair.examples / matrix[pair.true].sum())


def test_wrong_labels_that_come_together():
    labels = [[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]]
    predicted = [[0, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]
    found = confused_pairs(own_task("multilabel", 3), examples(predicted, labels))
    assert [(pair.true, pair.predicted, pair.examples, pair.share) for pair in found] == [
        (0, 1, 1, pytest.approx(1 / 3)),  # of three examples with the first class, one has the second in its place
        (0, 2, 1, pytest.approx(1 / 3)),
    ]


def test_not_all_pairs_of_many_classes_are_listed():
    labels = list(range(100))
    found = confused_pairs(own_task("classification", 100), examples([99 - label for label in labels], labels))
    assert len(found) == PAIRS


# What error_analysis says of own tasks -----------------------------------------------------------------------------


def test_scores_are_in_the_units_of_the_users_scale():
    task = own_task("regression", scale=(-100.0, 1000.0), metrics=("mae", "mse", "pearson"))
    found = examples([0.0, 500.0, 900.0], [10.0, 400.0, 1000.0])
    assert scores(task, found) == pytest.approx(
        {"mae": 70.0, "mse": (10**2 + 2 * 100**2) / 3, "pearson": np.corrcoef([0, 500, 900], [10, 400, 1000])[0, 1]}
    )
    assert facts(task, found) == {"mean error": "−3", "over-scored": "33%"}
    (group,) = (each for each in groups(task, found, properties(task, with_texts=False)))
    assert (group.label, group.predicted, group.score) == pytest.approx((470, 1400 / 3, 70))


def test_areas_are_of_the_probabilities():
    task = own_task("classification", 2, metrics=("roc_auc",))
    shares = [[0.4, 0.6], [0.3, 0.7], [0.9, 0.1], [0.2, 0.8]]
    assert scores(task, examples([1, 1, 0, 1], [0, 1, 0, 1], shares)) == {"roc_auc": 1.0}
    assert scores(task, examples([1, 1, 0, 1], [0, 1, 0, 1])) == {"roc_auc": 0.75}


def test_mistakes_of_several_labels_start_with_the_surest():
    task = own_task("multilabel", 2, metrics=("f1_micro",))
    found = examples(
        [[1, 0], [1, 1], [0, 0], [0, 1]],
        [[0, 0], [0, 0], [1, 0], [0, 1]],
        [[0.7, 0.1], [0.8, 0.6], [0.02, 0.3], [0.1, 0.9]],
    )
    assert [example.prediction.id for example in mistakes(task, found)] == ["2", "1", "0"]
    assert [example.off_by for example in found] == [1, 2, 1, 0]
    assert [example.wrong for example in found] == [[0], [0, 1], [0], []]
    assert [example.confidence for example in found] == [0.7, 0.8, pytest.approx(0.98), None]
    assert facts(task, found) == {
        "all classes right": "25.0%",
        "classes of an example": "0.50",
        "classes predicted": "1.00",
        "never predicted": "no class",
    }


def test_only_classes_that_are_numbers_have_an_order():
    assert is_ordered(TASKS["sst"])
    assert is_ordered(own_task("regression", scale=(0.0, 1.0)))
    assert is_ordered(own_task("classification", classes=(1, 2.5, 7)))
    for classes in (("a", "b", "c"), (False, True), tuple(range(77)), (1, 2, "many")):
        assert not is_ordered(own_task("classification", classes=classes))
    assert not is_ordered(own_task("multilabel", classes=(1, 2, 3)))
    texts = own_task("classification", 3)
    assert list(facts(texts, examples([0, 0], [0, 2]))) == ["by the commonest class alone", "never predicted"]
    assert facts(own_task("classification", 40), examples([0], [0]))["never predicted"].endswith(" and 34 more")


def test_a_group_has_the_mean_of_classes_that_are_numbers():
    task = own_task("classification", classes=(10, 20, 40))
    (group,) = groups(task, examples([2, 0], [0, 1]), properties(task, with_texts=False))
    assert (group.label, group.predicted) == (15, 25)


def test_a_class_is_shown_on_one_short_line():
    assert shown("two\nlines\u202e") == "two\\nlines\\u202e"
    assert shown("x" * 200) == "x" * 29 + "…"
    assert shown("مرحبا") == "مرحبا"
