"""Labels of users' files as numbers, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.tasks import Task, parse_tasks, tasks_to_yaml
from minbert.tasks.labels import LabelEncoder, class_key, decode_labels, infer_classes, split_labels


def encode_labels(task: Task, labels: Sequence[object]) -> np.ndarray:
    """float32 [n], or [n, C] of a multi-label task."""
    encoder = LabelEncoder(task)
    shape = (len(labels), task.num_classes) if task.is_multilabel else (len(labels),)
    return np.array([encoder(label) for label in labels], np.float32).reshape(shape)


def own_task(type_: str = "classification", classes: tuple | None = None, **fields) -> Task:
    return Task("own", ("text",), "label", type_, classes=classes, **fields)


texts = st.text(min_size=1).map(str.strip).filter(bool)
numbers = st.one_of(st.integers(-(2**40), 2**40), st.floats(-1e6, 1e6, allow_nan=False))
labels = st.one_of(st.lists(texts, min_size=2), st.lists(numbers, min_size=2), st.lists(st.booleans(), min_size=2))


@given(labels)
def test_every_label_comes_back_as_its_class(found):
    task = own_task(classes=infer_classes(found))
    encoded = encode_labels(task, found)
    assert encoded.dtype == np.float32
    assert encoded.shape == (len(found),)
    assert [class_key(label) for label in decode_labels(task, encoded)] == [class_key(label) for label in found]
    assert {*encoded.tolist()} == {*range(task.num_classes)}


@given(labels)
def test_classes_do_not_depend_on_the_order_and_have_each_label_once(found):
    classes = infer_classes(found)
    assert infer_classes(found[::-1]) == infer_classes([*found, *found]) == classes
    assert len({class_key(label) for label in found}) == len(classes)
    assert infer_classes(classes) == classes


def test_a_number_is_one_class_whatever_it_is_written_as():
    same = [1, 1.0, "1", " 1 ", "1.0"]
    assert {class_key(label) for label in same} == {"1"}
    assert len({class_key(label) for label in ("01", "1e0", "+1", True, "one", "1,0", 1)}) == 7
    assert class_key(2.5) == class_key("2.5") == class_key("2.50")
    assert class_key("-0.0") == class_key(0) == "0"
    task = own_task(classes=(0, 1, 2))
    assert encode_labels(task, [2, 2.0, "2", "2.0 "]).tolist() == [2, 2, 2, 2]


def test_booleans_are_the_words_true_and_false():
    assert infer_classes([True, False, True]) == (False, True)
    assert infer_classes(["true", "false"]) == ("false", "true")
    for classes in ((False, True), ("false", "true")):
        assert encode_labels(own_task(classes=classes), [True, "true", False, "false"]).tolist() == [1, 1, 0, 0]
    assert [type(label) for label in decode_labels(own_task(classes=(False, True)), np.array([0, 1]))] == [bool, bool]


def test_classes_are_sorted_by_value_where_all_are_numbers():
    assert infer_classes(["10", "9", "2.5"]) == (2.5, 9, 10)
    assert infer_classes(["10", "9", "x"]) == ("10", "9", "x")
    assert infer_classes(["007", "10", "9"]) == ("007", "10", "9")
    assert [type(label) for label in infer_classes([2.0, "3"])] == [int, int]


@pytest.mark.parametrize("digits", [16, 19, 30, 5000])
def test_long_identifiers_that_differ_in_their_last_digit_are_two_classes(digits):
    one, other = "9" * (digits - 1) + "1", "9" * (digits - 1) + "2"
    classes = infer_classes([other, one, one])
    assert tuple(map(str, classes)) == (one, other)
    assert encode_labels(own_task(classes=classes), [one, other, one]).tolist() == [0, 1, 0]
    with_own = {"own": own_task(classes=classes, train="train.csv", dev="dev.csv")}
    again = parse_tasks(tasks_to_yaml(with_own), "tasks.yaml", Path("/"))["own"]
    assert again.classes == classes


@pytest.mark.parametrize(
    ("classes", "label", "problem"),
    [
        (("a", "b"), "c", "label 'c' is none of the classes 'a', 'b'"),
        (("a", "b"), "A", "label 'A' is none of the classes"),
        (tuple("abcdefghij"), "z", "'h' and 2 more"),
        ((0, 1, 2), 3, "label 3 is outside 0 to 2"),
        ((0, 1, 2), "1.5", "label 1.5 is not a whole number"),
        ((0, 1, 2), "x", "label 'x' is not a number"),
        ((5, 7), 6, "label 6 is none of the classes 5, 7"),
        (("a", "b"), "", "no label"),
        (("a", "b"), " ", "no label"),
        (("a", "b"), None, "no label"),
    ],
)
def test_a_label_that_is_no_class_is_named(classes, label, problem):
    with pytest.raises(ValueError, match=r".") as error:
        LabelEncoder(own_task(classes=classes))(label)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_label_of_any_text_makes_one_short_line():
    with pytest.raises(ValueError, match=r"none of the classes") as error:
        LabelEncoder(own_task(classes=("a\nb", "c")))("x\ny" * 200)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@given(st.lists(st.sets(st.sampled_from(["red", "two words", "1", "é"])), min_size=1))
def test_several_labels_come_back_in_the_order_of_the_classes(found):
    task = own_task("multilabel", ("red", "two words", "1", "é"), separator="|")
    rows = encode_labels(task, ["|".join(sorted(each)) for each in found])
    assert rows.shape == (len(found), 4)
    assert rows.sum() == sum(map(len, found))
    assert (rows == encode_labels(task, [sorted(each) for each in found])).all()
    assert [{*each} for each in decode_labels(task, rows)] == found


def test_several_labels_are_split_at_the_separator_alone():
    assert split_labels(" a ; b;; ", ";") == ["a", "b"]
    assert split_labels("a, b", ";") == ["a, b"]
    assert split_labels(["a;b", 1], ";") == ["a;b", 1]
    assert split_labels("", ";") == split_labels(None, ";") == split_labels([], ";") == []
    with pytest.raises(ValueError, match="label 'c' is none of the classes"):
        LabelEncoder(own_task("multilabel", ("a", "b")))("a;c")


@given(st.floats(-1e3, 1e3), st.floats(0.1, 1e4), st.floats(0, 1))
def test_scores_are_brought_to_0_to_5_and_back(low, width, share):
    task = own_task("regression", scale=(low, low + width))
    value = min(max(low + share * width, low), low + width)
    inside = LabelEncoder(task)(value)
    assert -1e-9 <= inside <= 5 + 1e-9
    assert inside == pytest.approx(5 * (value - low) / width, abs=1e-6)
    (back,) = decode_labels(task, np.array([inside]))
    assert back == pytest.approx(value, abs=1e-6 * width)


def test_a_scale_of_0_to_5_is_computed_as_it_stands():
    task = own_task("regression", scale=(0, 5))
    values = [0, 0.1, 2.35, 3.8, 4.999, 5]
    assert encode_labels(task, values).tolist() == np.float32(values).tolist()


@pytest.mark.parametrize("label", ["", None, "high", "nan", "inf", True, 0.99, 5.01, "1,5"])
def test_a_score_outside_the_scale_or_that_is_no_number_is_refused(label):
    with pytest.raises(ValueError, match=r"^(no label|label .* is (outside 1 to 5|not a number))$"):
        LabelEncoder(own_task("regression", scale=(1, 5)))(label)
