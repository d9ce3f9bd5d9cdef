"""Files of predictions: the course's format, CSV in the user's labels with probabilities, and the details by line."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from minbert.data import Encoded
from minbert.errors import UserError
from minbert.runs.predictions import format_predictions, read_predictions, write_predictions
from minbert.tasks import TASKS, Task
from minbert.tasks.labels import LabelEncoder
from minbert.tasks.metrics import probabilities

HOSTILE = ("two\nlines", 'say "it", now', "a\rreturn", "<script>", "مرحبا", "=1+1", "x" * 200, ";", "tab\tbed")
REMEDY = "write it again"


def own_task(type_: str = "classification", classes: tuple = HOSTILE, **fields) -> Task:
    return Task("own", ("text",), "label", type_, classes=None if type_ == "regression" else classes, **fields)


def encoded(labels: np.ndarray | None, ids: list[str]) -> Encoded:
    """Examples of two tokens each."""
    count = len(ids)
    tokens, offsets = np.zeros(2 * count, np.int32), np.arange(0, 2 * count + 1, 2)
    return Encoded(tokens, tokens.astype(np.uint8), offsets, labels, ids, 0)


def rows_of(task: Task, ids: list[str], outputs: np.ndarray) -> list[list[str]]:
    return list(csv.reader(io.StringIO("".join(format_predictions(task, ids, outputs)), newline="")))


def test_the_courses_files_stay_as_the_course_has_them():
    outputs = np.array([[0, 0, 9, 0, 0], [0, 0, 0, 0, 1]], np.float32)
    lines = list(format_predictions(TASKS["sst"], ["a", "b"], outputs))
    assert lines == ["id \t Predicted_Sentiment \n", "a , 2 \n", "b , 4 \n"]
    lines = list(format_predictions(TASKS["sts"], ["a"], np.array([2.5])))
    assert lines == ["id \t Predicted_Similiary \n", "a , 2.5 \n"]


def test_any_class_survives_a_reader_of_csv_with_its_probability():
    task, ids = own_task(), ["1,2", *(f'"{number}' for number in range(2, 10))]
    outputs = np.log(np.full((9, 9), 0.02) + 0.8 * np.eye(9)).astype(np.float32)
    header, *rows = rows_of(task, ids, outputs)
    assert header == ["id", "prediction", *(f"probability of {name}" for name in HOSTILE)]
    assert [row[0] for row in rows] == ids
    assert [row[1] for row in rows] == list(HOSTILE)
    shares = np.array([row[2:] for row in rows], float)
    assert shares == pytest.approx(probabilities(task, outputs), abs=1e-6)
    assert shares.sum(1) == pytest.approx(np.ones(9), abs=1e-5)


@pytest.mark.parametrize(
    ("classes", "names"), [((False, True), ["false", "true"]), ((1, 2.5), ["1", "2.5"]), (("01", "1"), ["01", "1"])]
)
def test_classes_are_written_as_the_file_had_them(classes, names):
    header, *rows = rows_of(own_task(classes=classes), ["a", "b"], np.array([-1.0, 1.0], np.float32))
    assert header[2:] == [f"probability of {name}" for name in names]
    assert [row[1] for row in rows] == names


def test_several_labels_are_joined_and_a_label_with_the_separator_is_kept_whole():
    outputs = np.array([[3.0, -3.0, 3.0], [-3.0, -3.0, -3.0]], np.float32)
    task = own_task("multilabel", ("red", "two words", "blue"), separator="|")
    assert [row[1] for row in rows_of(task, ["a", "b"], outputs)[1:]] == ["red|blue", ""]
    task = own_task("multilabel", ("a;b", "c", "d"), separator=";")
    assert [json.loads(row[1]) for row in rows_of(task, ["a", "b"], outputs)[1:]] == [["a;b", "d"], []]


def test_a_score_is_on_the_users_scale():
    task = own_task("regression", scale=(-100.0, 1000.0))
    assert rows_of(task, ["a", "b"], np.array([0.0, 2.5])) == [["id", "prediction"], ["a", "-100.0"], ["b", "450.0"]]
    ((_, value),) = rows_of(task, ["a"], np.array([1 / 3], np.float32))[1:]
    assert value == "-26.667"  # the digits that float32 keeps


def draws(task: Task, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and labels inside minbert."""
    generator = np.random.default_rng(0)
    if task.is_regression:
        labels = np.concatenate([[0.0, 5.0], generator.uniform(0, 5, count)])[:count]
        return generator.uniform(-1, 6, count).astype(np.float32), labels.astype(np.float32)
    shape = (count, task.num_classes) if task.num_outputs > 1 else (count,)
    if task.is_multilabel:
        labels = (generator.random(shape) < 0.4).astype(np.float32)
    else:
        labels = generator.integers(0, task.num_classes, count).astype(np.float32)
    return generator.normal(0, 2, shape).astype(np.float32), labels


@pytest.mark.parametrize(
    "task",
    [
        TASKS["sst"],
        TASKS["qqp"],
        TASKS["sts"],
        TASKS["mnli"],
        own_task(),
        own_task(classes=(False, True)),
        own_task(classes=(3, "x", 7.5)),
        own_task("multilabel"),
        own_task("multilabel", thresholds=(0.2,) * 9),
        own_task("regression", scale=(1.0, 5.0)),
        own_task("regression", scale=(0.0, 1e-3)),
        own_task("regression", scale=(0.0, 4.6051709)),  # ends that rounding would leave
        own_task("regression", scale=(-3.2188759, 2e6)),
    ],
    ids=lambda task: f"{task.name} {task.type} {task.num_classes}",
)
def test_what_is_written_is_read(task, tmp_path):
    outputs, labels = draws(task, 30)
    ids = [f"{number}\n," for number in range(30)]
    write_predictions(tmp_path, task, "dev", encoded(labels, ids), outputs)
    found = read_predictions(tmp_path, task, "dev", REMEDY)
    assert [each.id for each in found] == ids
    assert {each.tokens for each in found} == {2}
    if task.is_regression:
        low, high = task.scale
        for each, of in (("label", labels), ("predicted", outputs)):
            values = low + of.astype(np.float64) * (high - low) / 5
            assert [getattr(one, each) for one in found] == pytest.approx(values, abs=1e-4 * (high - low))
        assert {each.probabilities for each in found} == {None}
    else:
        assert (np.array([each.label for each in found]) == labels).all()
        shares = probabilities(task, outputs)
        assert np.array([each.probabilities for each in found]) == pytest.approx(shares, abs=1e-6)
        predicted = np.array([each.predicted for each in found])
        if task.is_multilabel:
            assert (predicted == (shares > np.array(task.thresholds or 0.5))).all()
        else:
            assert (predicted == shares.argmax(1)).all()
    (lines,) = tmp_path.glob("*-dev.jsonl")
    shown = [json.loads(line)["label"] for line in lines.read_text(encoding="utf-8").splitlines()]
    if not task.is_regression:
        assert (np.array([LabelEncoder(task)(label) for label in shown], np.float32) == labels).all()
        flat = [each for label in shown for each in (label if task.is_multilabel else [label])]
        assert all(any(type(each) is type(one) and each == one for one in task.classes) for each in flat)


def test_a_split_without_labels_has_predictions_without_them(tmp_path):
    task = own_task("multilabel")
    write_predictions(tmp_path, task, "test", encoded(None, ["a"]), draws(task, 1)[0])
    (found,) = read_predictions(tmp_path, task, "test", REMEDY)
    assert found.label is None
    assert len(found.predicted) == 9
    assert read_predictions(tmp_path, task, "dev", REMEDY) is None


@pytest.mark.parametrize(
    ("type_", "change", "problem"),
    [
        ("classification", {"predicted": "neither"}, "label 'neither' is none of the classes"),
        ("classification", {"label": ["red"]}, "label: expected a label, got a list"),
        ("classification", {"predicted": None}, "predicted: expected"),
        ("classification", {"probabilities": [0.5]}, "probabilities: expected 2 shares"),
        ("classification", {"probabilities": [0.5, 1.5]}, "probabilities: expected 2 shares"),
        ("classification", {"tokens": -1}, "tokens: expected 0 or more"),
        ("classification", {"other": 1}, "unknown 'other'"),
        ("multilabel", {"predicted": "red"}, "predicted: expected a list"),
        ("multilabel", {"label": ["red", "neither"]}, "label 'neither' is none of the classes"),
        ("regression", {"predicted": "high"}, "predicted: expected a number"),
        ("regression", {"label": 5.5}, "label: expected 1 to 5"),
        ("regression", {"probabilities": [0.5, 0.5]}, "probabilities: expected"),
    ],
)
def test_a_damaged_line_is_named(type_, change, problem, tmp_path):
    task = own_task(type_, ("red", "blue"), scale=(1.0, 5.0))
    outputs, labels = draws(task, 2)
    write_predictions(tmp_path, task, "dev", encoded(labels, ["a", "b"]), outputs)
    path = tmp_path / "own-dev.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps({**json.loads(second), **change})}\n")
    with pytest.raises(UserError) as error:
        read_predictions(tmp_path, task, "dev", REMEDY)
    assert str(error.value).startswith(f"{path} is damaged (line 2: ")
    assert problem in str(error.value)
    assert str(error.value).endswith(f"; {REMEDY}")
