"""What is held out follows from the examples: stratified, never a text that is trained on, the same each time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from own_task import own_task

from minbert.data import Examples, Folds, dev_rows, fold_numbers, open_source
from minbert.data.own_tasks import OwnTasks
from minbert.errors import UserError
from minbert.tasks import TASKS, Task

CLASSES = ("a", "b", "c", "d")
TOPICS = Task("topics", ("message",), "topic", classes=CLASSES)
TAGS = Task("tags", ("message",), "tags", type="multilabel", classes=CLASSES)
STARS = Task("stars", ("message",), "stars", type="regression")
SHARES = st.floats(0.01, 0.99)
LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=60)
# few different texts, so that many are there several times
ROWS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=40)


def examples(labels, texts=None, pairs=None) -> Examples:
    texts = [f"text {number}" for number in range(len(labels))] if texts is None else texts
    return Examples([str(number) for number in range(len(labels))], texts, pairs, np.array(labels, np.float32))


@given(labels=LABELS, share=SHARES)
def test_the_share_of_each_class_is_held_out_within_one_example(labels, share):
    rows = dev_rows(examples(labels), TOPICS, share)
    assert rows.tolist() == sorted({*rows.tolist()})
    everything, held = Counter(labels), Counter(np.array(labels)[rows].tolist())
    assert all(abs(held[label] - share * count) <= 1 for label, count in everything.items())
    assert all(held[label] < count for label, count in everything.items()), "each class keeps one to train on"
    if all(count > share * count + 1 for count in everything.values()):
        assert abs(len(rows) - share * len(labels)) <= 0.5 + 1e-9


@given(rows=ROWS, share=SHARES, folds=st.integers(2, 5), data=st.data())
def test_texts_of_several_examples_are_on_one_side(rows, share, folds, data):
    texts, labels = [f"text {text}" for text, _ in rows], [label for _, label in rows]
    some = examples(labels, texts)
    held = dev_rows(some, TOPICS, share)
    train = np.setdiff1d(np.arange(len(rows)), held)
    assert {texts[row] for row in held}.isdisjoint(texts[row] for row in train)
    assert {labels[row] for row in train} == {*labels}
    numbers = fold_numbers(some, TOPICS, folds)
    assert all(len({numbers[row] for row, each in enumerate(texts) if each == text}) == 1 for text in texts)
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = examples([labels[row] for row in order], [texts[row] for row in order])
    again = dev_rows(shuffled, TOPICS, share)
    assert {texts[row] for row in held} == {texts[order[row]] for row in again}, "the order of the rows does not matter"


@given(labels=LABELS, folds=st.integers(2, 6))
def test_folds_are_even_in_each_class(labels, folds):
    numbers = fold_numbers(examples(labels), TOPICS, folds)
    assert numbers.min() >= 0
    assert numbers.max() < folds
    for label in [*range(4), None]:
        of_label = [fold for fold, each in zip(numbers, labels, strict=True) if label in (each, None)]
        counts = [of_label.count(fold) for fold in range(folds)]
        assert max(counts) - min(counts) <= 1


def test_a_pair_in_the_other_order_is_the_same_pair():
    count = 200
    first, second = [f"one {number}" for number in range(count)], [f"other {number}" for number in range(count)]
    both = examples([0] * 2 * count, first + second, second + first)
    held = np.zeros(2 * count, bool)
    held[dev_rows(both, replace(TOPICS, text=("first", "second")), 0.3)] = True
    assert (held[:count] == held[count:]).all()
    assert 0.28 * count <= held[:count].sum() <= 0.32 * count


def test_scores_are_held_out_over_the_whole_scale():
    scores = np.linspace(0, 5, 1000)
    held = scores[dev_rows(examples(scores), STARS, 0.1)]
    counts, _ = np.histogram(held, bins=10, range=(0, 5))
    assert counts.tolist() == [10] * 10


@given(scores=st.lists(st.floats(0, 5), min_size=2, max_size=50), share=SHARES)
def test_the_share_of_scores_is_held_out_of_few_examples_too(scores, share):
    held = dev_rows(examples(scores), STARS, share)
    assert len(held) < len(scores)
    assert abs(len(held) - share * len(scores)) <= (0.5 + 1e-9 if share * len(scores) < len(scores) - 1 else 1)


def test_tasks_without_a_dev_split_are_not_folded():
    class Auxiliary(OwnTasks):
        def __init__(self, split: str) -> None:
            self.name, self.split = "some source", split

        def splits(self, task):
            return [self.split]

        def load(self, task, split):
            return examples([0, 1])

    for split, task in [("train", replace(TOPICS, evaluated=False)), ("dev", TOPICS)]:
        folds = Folds(Auxiliary(split), 2, 0)
        assert folds.splits(task) == [split]
        assert len(folds.load(task, split)) == 2


def test_sets_of_labels_are_held_out_by_their_rarest():
    rows = [[1, 0, 0, 0]] * 80 + [[1, 1, 0, 0]] * 20 + [[0, 0, 0, 0]] * 10 + [[1, 1, 1, 1]]
    held = dev_rows(examples(rows), TAGS, 0.1)
    assert [(held < 80).sum(), ((held >= 80) & (held < 100)).sum(), (held >= 100).sum()] == [8, 2, 1]
    assert 110 not in held, "the last example of a label is trained on"


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 9), st.lists(st.booleans(), min_size=4, max_size=4)), min_size=1))
def test_each_label_is_trained_on(rows):
    labels = np.array([label for _, label in rows])
    held = dev_rows(examples(labels, [f"text {text}" for text, _ in rows]), TAGS, 0.5)
    trained = np.delete(labels, held, axis=0)
    assert (trained.any(0) == labels.any(0)).all()


def test_different_texts_are_held_out_each_time_the_texts_differ():
    one, other = (dev_rows(examples([0] * 100, [f"{name} {i}" for i in range(100)]), TOPICS, 0.5) for name in "ab")
    assert one.tolist() != other.tolist()
    assert one.tolist() not in ([*range(50)], [*range(50, 100)])


def test_the_folds_of_a_source_are_its_training_examples(course_data):
    source, task = open_source(str(course_data)), TASKS["sst"]
    whole = source.load(task, "train")
    folds = [Folds(source, 3, fold) for fold in range(3)]
    dev, train = ([each.load(task, split) for each in folds] for split in ("dev", "train"))
    assert sorted(identity for each in dev for identity in each.ids) == sorted(whole.ids)
    for held, kept in zip(dev, train, strict=True):
        assert sorted([*held.ids, *kept.ids]) == sorted(whole.ids)
        assert {*held.texts}.isdisjoint(kept.texts)
        assert [identity for identity in whole.ids if identity in {*kept.ids}] == kept.ids, "in the order of the file"
    assert folds[0].splits(task) == source.splits(task)
    assert folds[0].load(task, "test").ids == source.load(task, "test").ids
    assert (folds[1].tasks(), folds[1].complete(task), folds[1].warnings(task)) == (source.tasks(), task, [])
    assert folds[1].name == f"{course_data}, fold 2 of 3"


def test_a_dev_share_is_trained_on_where_folds_are_held_out(tmp_path):
    rows = "".join(f"text {number},{'ab'[number % 2]}\n" for number in range(20))
    (tmp_path / "train.csv").write_text(f"message,topic\n{rows},a\n")
    record = own_task(tmp_path, dev=0.25)
    source = open_source(None, {"topics": record})
    task = source.complete(record)
    assert [len(source.load(task, split)) for split in ("train", "dev")] == [15, 5]
    fold = Folds(source, 5, 0)
    assert [len(fold.load(task, split)) for split in ("train", "dev")] == [16, 4]
    assert [len(fold.load(task, split).skipped) for split in ("train", "dev")] == [1, 0]
    with pytest.raises(UserError, match="fewer different texts than 30 folds; give fewer --folds"):
        [Folds(source, 30, number).load(task, "dev") for number in range(30)]
