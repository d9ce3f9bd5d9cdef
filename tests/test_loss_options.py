"""Class weights and label smoothing of a run: what they are, from which labels, and which losses get them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from minbert.config import TrainConfig
from minbert.data import Encoded, open_source
from minbert.errors import UserError
from minbert.methods.losses import LOSSES
from minbert.tasks import TASKS, Task, read_tasks
from minbert.training.loss_options import class_weights, loss_options

TOPICS = Task("topics", ("text",), "topic", classes=("bug", "billing", "other"), class_weights="balanced")
TAGS = Task("tags", ("text",), "tags", "multilabel", ("red", "green", "blue", "none"), class_weights="balanced")
LABELS = np.array([0, 0, 0, 1, 2, 2, 0], np.float32)
ROWS = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]], np.float32)
CPU = torch.device("cpu")


def encoded(labels: np.ndarray) -> Encoded:
    n = len(labels)
    return Encoded(np.ones(n, np.int32), np.zeros(n, np.uint8), np.arange(n + 1), labels, [""] * n, 0)


def options(task: Task, smoothing: float | dict[str, float] = 0.0, labels: np.ndarray = LABELS) -> dict:
    return loss_options([task], {task.name: encoded(labels)}, smoothing, CPU)[task.name]


def test_balanced_weights_are_scikit_learns():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(class_weights(TOPICS, LABELS), expected)
    weights = class_weights(TOPICS, LABELS)
    assert len({round(float(weights[c] * (c == LABELS).sum()), 6) for c in range(3)}) == 1  # all weigh the same


def test_a_class_without_examples_has_weight_1():
    four = dataclasses.replace(TOPICS, classes=("bug", "billing", "other", "unseen"))
    assert class_weights(four, LABELS)[3] == 1.0


def test_balanced_weights_of_several_labels_are_negatives_over_positives():
    np.testing.assert_allclose(class_weights(TAGS, ROWS), [3 / 2, 1 / 4, 1.0, 1.0])  # all have blue, and nobody none


def test_given_weights_go_to_their_classes():
    given = dataclasses.replace(TOPICS, class_weights={"other": 3.0, "bug": 0.5})
    assert class_weights(given, LABELS).tolist() == [0.5, 1.0, 3.0]
    numbers = dataclasses.replace(TOPICS, classes=(1, 2, 3), class_weights={"3": 2.0, "1.0": 4.0})
    assert class_weights(numbers, LABELS).tolist() == [4.0, 1.0, 2.0]


def test_weights_of_numbers_and_booleans_in_a_tasks_file_reach_their_classes(tmp_path):
    record = "text: t, label: l, type: classification, train: train.csv, dev: 0.5"
    weights = {"numbers": "{2: 3.0}", "booleans": "{true: 3.0}"}
    lines = [
        f"  {name}: {{{record.replace('train.csv', name + '.csv')}, class_weights: {of}}}"
        for name, of in weights.items()
    ]
    (tmp_path / "tasks.yaml").write_text("\n".join(["tasks:", *lines]))
    for name, labels in (("numbers", "12"), ("booleans", ("false", "true"))):
        rows = [f"text {number},{labels[number % 2]}" for number in range(8)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["t,l", *rows]) + "\n")
    source = open_source(None, read_tasks(tmp_path / "tasks.yaml"))
    for task in read_tasks(tmp_path / "tasks.yaml").values():
        complete = source.complete(task)
        assert class_weights(complete, LABELS).tolist() == [1.0, 3.0], complete.classes


def test_a_weight_of_no_class_is_one_line():
    wrong = dataclasses.replace(TOPICS, class_weights={"bugs\x1b": 3.0})
    with pytest.raises(UserError) as caught:
        class_weights(wrong, LABELS)
    line = str(caught.value)
    assert line == (
        "task topics: class_weights: unknown class 'bugs\\x1b' (did you mean 'bug'?); known: 'bug', 'billing', 'other'"
    )


def test_only_what_is_set_is_passed():
    plain = dataclasses.replace(TOPICS, class_weights=None)
    assert options(plain) == {}
    assert options(plain, 0.1) == {"label_smoothing": 0.1}
    assert options(plain, {"topics": 0.2}) == {"label_smoothing": 0.2}
    found = options(TOPICS)
    assert [*found] == ["class_weights"]
    assert found["class_weights"].dtype == torch.float32


def test_a_loss_with_three_arguments_gets_nothing_of_one_number_for_all(monkeypatch):
    monkeypatch.setitem(LOSSES, "own", lambda logits, labels, top=1.0: logits.sum())
    own = dataclasses.replace(TOPICS, class_weights=None, loss="own")
    tasks = [dataclasses.replace(TOPICS, class_weights=None), dataclasses.replace(own, name="own"), TASKS["sts"]]
    found = loss_options(tasks, {}, 0.1, CPU)
    assert found == {"topics": {"label_smoothing": 0.1}, "own": {}, "sts": {}}
    with pytest.raises(UserError, match="task topics: class_weights: its loss own takes none"):
        options(dataclasses.replace(own, class_weights="balanced"))
    with pytest.raises(UserError, match=r"--label-smoothing.topics 0.1: its loss own takes none"):
        options(own, {"topics": 0.1})


def test_smoothing_that_does_nothing_is_an_error():
    with pytest.raises(UserError, match=r"--label-smoothing 0.1: no loss of the tasks sts takes it"):
        options(TASKS["sts"], 0.1)
    with pytest.raises(UserError, match=r"--label-smoothing.sts 0.1: its labels are scores; leave sts out"):
        TrainConfig(label_smoothing={"sts": 0.1})
    with pytest.raises(UserError, match=r"--label-smoothing.qqp 0.1: its loss cosine_embedding takes none"):
        TrainConfig(label_smoothing={"qqp": 0.1}, losses={"qqp": "cosine_embedding"}, heads={"qqp": "cosine"})
    with pytest.raises(UserError, match="--label-smoothing must be at least 0 and below 1, got 1"):
        TrainConfig(label_smoothing=1)
