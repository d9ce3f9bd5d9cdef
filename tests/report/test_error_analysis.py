"""What a run gets wrong: scores, confusion, groups by property of the texts, mistakes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.report.class_analysis import confusion
from minbert.report.error_analysis import (
    OF_PAIRS,
    OF_SENTENCES,
    Example,
    facts,
    groups,
    has_pronoun,
    is_negated,
    length_difference,
    mistakes,
    scores,
    word_overlap,
)
from minbert.runs.predictions import PredictedExample
from minbert.tasks import TASKS


def examples(task: str, predicted: list[float], labels: list[float], texts: list[tuple[str, ...]] | None = None):
    """Examples with all of the probability on what is predicted."""
    classes = TASKS[task].num_classes
    found = []
    for i, (each, label) in enumerate(zip(predicted, labels, strict=True)):
        spread = [float(number == each) for number in range(classes)] or None
        found.append(Example(PredictedExample(str(i), each, 8 + i, label, spread), texts[i] if texts else ()))
    return found


def test_the_scores_of_the_predictions_are_those_of_training(run):
    for name, metrics in run.summary()["dev"].items():
        if name in TASKS:
            found = [Example(prediction) for prediction in run.predictions(TASKS[name], "dev")]
            assert scores(TASKS[name], found) == pytest.approx(metrics, abs=1e-6)


labels_and_predictions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


@given(labels_and_predictions)
def test_a_confusion_matrix_counts_every_example_once(pairs):
    labels, predicted = map(list, zip(*pairs, strict=True))
    found = examples("sst", predicted, labels)
    matrix = np.array(confusion(TASKS["sst"], found))
    assert matrix.sum(axis=1).tolist() == np.bincount(labels, minlength=5).tolist()
    assert matrix.sum(axis=0).tolist() == np.bincount(predicted, minlength=5).tolist()
    assert np.trace(matrix) / len(pairs) == pytest.approx(scores(TASKS["sst"], found)["accuracy"])
    assert len(mistakes(TASKS["sst"], found)) == matrix.sum() - np.trace(matrix)


@given(labels_and_predictions)
def test_the_groups_of_a_property_part_the_examples(pairs):
    labels, predicted = map(list, zip(*pairs, strict=True))
    texts = [(("not " if label else "") + "good",) for label in labels]
    found = examples("sst", predicted, labels, texts)
    for title in ("tokens", "negation"):
        parts = [group for group in groups(TASKS["sst"], found, OF_SENTENCES) if group.title == title]
        assert sum(group.examples for group in parts) == len(found)
        assert len({group.name for group in parts}) == len(parts)
        for whole, of_group in (
            (scores(TASKS["sst"], found)["accuracy"], "score"),
            (np.mean(predicted) - np.mean(labels), "bias"),
        ):
            mean = sum(getattr(group, of_group) * group.examples for group in parts) / len(found)
            assert mean == pytest.approx(whole)


@given(st.text(), st.text())
def test_word_overlap_is_a_share_and_symmetric(one, other):
    assert word_overlap(one, other) == word_overlap(other, one)
    assert 0 <= word_overlap(one, other) <= 1
    assert word_overlap(one, one) == 1


def test_properties_on_the_papers_own_examples():
    chief = "UN chief welcomes peaceful presidential elections in Guinea", "UN chief condemns attack in Mali"
    assert word_overlap(*chief) == pytest.approx(3 / 11)
    assert length_difference("Is atheism growing?", "Why is atheism growing?") == 1
    angry = ("What makes one angry?", "What is the one thing that makes you most angry?")
    assert [has_pronoun(text) for text in angry] == [False, True]
    pronouns = next(each for each in OF_PAIRS if each.title == "pronouns")
    assert pronouns.cell(Example(PredictedExample("1", 0, 9, 1), angry))[0] == "in one"
    assert is_negated("I think there isn’t a general answer")
    assert is_negated("it does n't work")
    assert not is_negated("nothingness, a knot and a notion")


def test_numbers_are_grouped_between_their_edges():
    tokens = OF_SENTENCES[0]
    names = [tokens.group(Example(PredictedExample("1", 0, count, 0)))[1] for count in (9, 10, 19, 20, 160, 500)]
    assert names == ["below 10", "10 to 19", "10 to 19", "20 to 29", "160 or more", "160 or more"]
    difference = next(each for each in OF_PAIRS if each.title == "difference in words")
    names = [
        difference.group(Example(PredictedExample("1", 0, 9, 0), ("a", "b " * count)))[1] for count in (1, 2, 3, 7)
    ]
    assert names == ["0", "1 to 2", "1 to 2", "6 or more"]
    overlap = OF_PAIRS[0]
    assert overlap.group(Example(PredictedExample("1", 0, 9, 0), ("a b", "b c d e")))[1] == "below 0.25"
    assert overlap.group(Example(PredictedExample("1", 0, 9, 0), ("a b", "b c")))[1] == "0.25 to below 0.5"


def test_mistakes_start_with_the_surest_and_the_farthest():
    sure = [
        PredictedExample("a", 1, 9, 0, [0.4, 0.6]),
        PredictedExample("b", 1, 9, 0, [0.1, 0.9]),
        PredictedExample("c", 1, 9, 1),
    ]
    found = mistakes(TASKS["qqp"], [Example(each) for each in sure])
    assert [example.prediction.id for example in found] == ["b", "a"]
    assert [example.confidence for example in found] == [0.9, 0.6]
    far = mistakes(TASKS["sts"], examples("sts", [1.0, 0.5, 4.0], [1.2, 3.5, 3.0]))
    assert [example.off_by for example in far] == pytest.approx([-3.0, 1.0, -0.2])


def test_facts_of_classes_and_of_similarities():
    found = facts(TASKS["sst"], examples("sst", [1, 1, 3, 3], [0, 1, 1, 4]))
    assert found["within one class"] == "75.0%"
    assert found["mistakes off by one"] == "66.7%"
    assert found["never predicted"] == "0, 2, 4"
    assert found["by the commonest class alone"] == "0.500"
    found = facts(TASKS["qqp"], examples("qqp", [1, 1, 0, 0], [1, 0, 1, 1]))
    assert (found["precision"], found["recall"]) == ("0.500", "0.333")
    assert facts(TASKS["qqp"], examples("qqp", [0], [0]))["precision"] == "–"
    assert facts(TASKS["sst"], examples("sst", [0], [0]))["mistakes off by one"] == "no mistakes"
    found = facts(TASKS["sts"], examples("sts", [1.0, 1.0], [2.0, 0.5]))
    assert found == {"mean absolute error": "0.75", "mean error": "−0.25", "over-scored": "50%"}
