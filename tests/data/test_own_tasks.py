"""A user's own tasks: classes from the training file, a dev share, and one line for whatever is wrong."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from own_task import own_task

from minbert.data import Examples, TextColumn, encode, open_source, read_file
from minbert.data.own_tasks import OwnTasks
from minbert.data.tokenizer import Tokenizer
from minbert.errors import UserError
from minbert.tasks import TASKS, Task


@pytest.fixture
def directory(tmp_path):
    return tmp_path


def write(path, labels, column="topic"):
    """A file of different texts with these labels."""
    if path.suffix == ".jsonl":
        rows = [{"message": f"{path.stem} {number}", column: label} for number, label in enumerate(labels)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows = [f"{path.stem} {number},{label}\n" for number, label in enumerate(labels)]
        path.write_text(f"message,{column}\n" + "".join(rows))


def opened(directory, train, name="train.csv", **values) -> tuple[OwnTasks, Task]:
    """The source, and the complete task, of a training file with these labels."""
    write(directory / name, train)
    record = own_task(directory, train=name, **values)
    source = OwnTasks({"topics": record})
    return source, source.complete(record)


def refusal(directory, train, split="train", **values) -> str:
    source, task = opened(directory, train, **values)
    with pytest.raises(UserError) as refused:
        source.load(task, split)
    assert str(refused.value).isprintable()
    return str(refused.value).replace(str(directory), "DIR")


def warnings_of(directory, train, **values) -> list[str]:
    source, task = opened(directory, train, **values)
    for split in source.splits(task):
        source.load(task, split)
    assert all(line.isprintable() for line in source.warnings(task))
    return [line.replace(str(directory), "DIR") for line in source.warnings(task) if "also trained on" not in line]


@pytest.mark.parametrize(
    ("name", "labels", "classes"),
    [
        ("train.csv", ["b", "a", "b", "a"], ("a", "b")),
        ("train.csv", [10, 9, 9, 10], (9, 10)),
        ("train.jsonl", [True, False, True, False], (False, True)),
        ("train.jsonl", [1.5, 2, 2.0, "2"], (1.5, 2)),
    ],
)
def test_classes_are_the_sorted_labels_of_the_training_file(directory, name, labels, classes):
    source, task = opened(directory, labels, name)
    assert task.classes == classes
    assert task.loss == "binary_cross_entropy"
    examples = [source.load(task, split) for split in ("train", "dev")]
    texts = sorted((text, label) for each in examples for text, label in zip(each.texts, each.labels, strict=True))
    found = [classes[int(label)] for _, label in texts]
    assert [float(each) if isinstance(each, int) else each for each in found] == [
        float(label) if not isinstance(label, str) or label.isdigit() else label for label in labels
    ]


def test_booleans_are_the_same_in_every_format(directory):
    write(directory / "dev.csv", ["True", "FALSE", "true"])
    source, task = opened(directory, [True, False], "train.jsonl", dev="dev.csv")
    assert source.load(task, "dev").labels.tolist() == [1, 0, 1]
    write(directory / "dev.jsonl", [True, False])
    for classes in (None, [False, True]):
        source, task = opened(directory, ["False", "True"], dev="dev.jsonl", classes=classes)
        assert task.classes == (("False", "True") if classes is None else (False, True))
        assert source.load(task, "dev").labels.tolist() == [1, 0]
    write(directory / "dev.csv", ["yes"])
    source, task = opened(directory, [True, False], "train.jsonl", dev="dev.csv")
    with pytest.raises(UserError, match="line 2: label 'yes' is none of the classes false, true"):
        source.load(task, "dev")


def test_labels_of_several_are_between_separators_or_in_lists(directory):
    for name, labels in [("train.csv", ["a;b", "", " b ; c"]), ("train.jsonl", [["b", "a"], None, ["b", "c"]])]:
        source, task = opened(directory, labels, name, type="multilabel", dev=name)
        assert task.classes == ("a", "b", "c")
        assert source.load(task, "train").labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 1]]


def test_scores_are_brought_to_the_scale_inside(directory):
    source, task = opened(directory, [1, 3, 4.5, 5], type="regression", scale=[1, 5], dev="train.csv")
    np.testing.assert_allclose(source.load(task, "train").labels, [0, 2.5, 4.375, 5])


def test_splits_are_those_of_the_record(directory):
    write(directory / "test.jsonl", ["a", "b"])
    source, task = opened(directory, ["a", "b"] * 4, test="test.jsonl")
    assert (source.tasks(), source.splits(task)) == (["topics"], ["train", "dev", "test"])
    assert source.load(task, "test").labels.tolist() == [0, 1]
    source, task = opened(directory, ["a", "b"] * 4)
    assert source.splits(task) == ["train", "dev"]
    with pytest.raises(UserError, match="task topics has no test split"):
        source.load(task, "test")
    with pytest.raises(UserError, match=r"train\.csv has no train split of sst; it has topics; give --data for others"):
        source.load(TASKS["sst"], "train")


@pytest.mark.parametrize("labels", [["", ""], ["-1", "-1"]])
def test_a_test_file_may_lack_labels(directory, labels):
    write(directory / "test.csv", labels)
    source, task = opened(directory, ["a", "b"] * 4, test="test.csv")
    assert source.load(task, "test").labels is None
    write(directory / "test.csv", labels, column="other")
    source, task = opened(directory, ["a", "b"] * 4, test="test.csv")
    assert source.load(task, "test").labels is None


def test_a_test_file_with_some_labels_has_those_rows(directory):
    write(directory / "test.csv", ["a", "", "b"])
    source, task = opened(directory, ["a", "b"] * 4, test="test.csv")
    test = source.load(task, "test")
    assert (test.ids, test.labels.tolist(), test.lines.tolist()) == (["0", "2"], [0, 1], [2, 4])
    assert [(row.line, row.reason) for row in test.skipped] == [(3, "no label")]


def test_minus_one_is_a_label_where_it_is_a_class(directory):
    write(directory / "test.csv", ["-1", "-1"])
    source, task = opened(directory, ["-1", "1"] * 4, test="test.csv")
    assert source.load(task, "test").labels.tolist() == [0, 0]


def test_the_dev_share_is_the_same_in_every_order_and_process(directory):
    labels = [f"class {number % 5}" for number in range(100)]
    source, task = opened(directory, labels, dev=0.2)
    dev, train = source.load(task, "dev"), source.load(task, "train")
    assert np.bincount(dev.labels.astype(int)).tolist() == [4] * 5
    assert (len(train), {*dev.texts} & {*train.texts}) == (80, set())
    other = OwnTasks({"topics": own_task(directory, dev=0.2)})
    assert (other.load(task, "train").ids, other.load(task, "dev").ids) == (train.ids, dev.ids)
    lines = np.array((directory / "train.csv").read_text().splitlines())
    assert [lines[number - 1].split(",")[0] for number in dev.lines] == list(dev.texts)


@settings(deadline=None)
@given(numbers=st.lists(st.integers(0, 15), min_size=20), share=st.floats(0.1, 0.9))
def test_no_text_of_train_is_in_the_dev_share(tmp_path_factory, numbers, share):
    directory = tmp_path_factory.getbasetemp()
    rows = "".join(f"text {number},{'ab'[number % 2]}\n" for number in [*numbers, *range(16)])
    (directory / "train.csv").write_text(f"message,topic\n{rows}")
    record = own_task(directory, dev=share)
    source = OwnTasks({"topics": record})
    task = source.complete(record)
    train, dev = (source.load(task, split) for split in ("train", "dev"))
    assert {*train.texts}.isdisjoint(dev.texts)
    assert sorted([*train.ids, *dev.ids], key=int) == [str(number) for number in range(len(numbers) + 16)]


@pytest.mark.parametrize(
    ("labels", "values", "said"),
    [
        (["a"] * 3, {}, "DIR/train.csv: column 'topic' has one label, 'a', in all 3 rows; expected two classes"),
        (["a"] * 3, {"classes": ["a", "b"]}, "DIR/train.csv: column 'topic' has one label, 'a', in all 3 rows; there"),
        ([3] * 3, {"type": "regression", "scale": [1, 5]}, "column 'topic' has one label, 3, in all 3 rows"),
        (["a;b"] * 3, {"type": "multilabel"}, "column 'topic' has one label, 'a', 'b', in all 3 rows"),
        ([""] * 3, {"type": "multilabel"}, "column 'topic' has no label in all 3 rows; expected two classes or more"),
        (range(10_001), {}, "column 'topic' has 10001 different labels; expected at most 10000 classes"),
        (["a", "x", "x"], {"classes": ["a", "b"]}, "DIR/train.csv, line 3: label 'x' is none of"
         " the classes 'a', 'b' (2 rows have it)"),
        (["1", "7"], {"type": "regression", "scale": [1, 5]}, "DIR/train.csv, line 3: label 7 is outside 1 to 5"),
        (["1", "x"], {"type": "regression", "scale": [1, 5]}, "DIR/train.csv, line 3: label 'x' is not a number"),
        (["", ""], {}, "DIR/train.csv: none of its 2 rows is usable; line 2: no label"),
        (["a", "b"], {"class_weights": {"bb": 2.0}}, "class_weights: no class 'bb'"),
        (["a", "b"], {"train": "none.csv"}, "task topics: train: DIR/none.csv cannot be read (No such file"),
    ],
)  # fmt: skip
def test_a_bad_training_file_is_refused_in_one_line(directory, labels, values, said):
    write(directory / "train.csv", labels)
    record = own_task(directory, **{"dev": "train.csv", **values})
    source = OwnTasks({"topics": record})
    with pytest.raises(UserError) as refused:
        source.load(source.complete(record), "train")
    assert str(refused.value).isprintable()
    assert said in str(refused.value).replace(str(directory), "DIR")


def test_labels_unknown_in_training_are_refused_with_their_line(directory):
    for split in ("dev", "test"):
        write(directory / "other.csv", ["a", "", "c", "d"])
        said = refusal(directory, ["a", "b"] * 4, split, **{"dev": 0.5, split: "other.csv"})
        assert said == "DIR/other.csv, line 4: label 'c' is none of the classes 'a', 'b'"


def test_a_share_that_holds_nothing_out_is_refused(directory):
    said = refusal(directory, [f"class {number}" for number in range(40)], "dev", dev=0.1)
    assert said.startswith("DIR/train.csv: dev: 0.1 of its 40 examples of topics is none, as each class keeps one")
    scores = {"type": "regression", "scale": [0, 5], "dev": 0.1}
    said = refusal(directory, [1, 2, 3, 4], "dev", **scores)
    assert said.startswith("DIR/train.csv: dev: 0.1 of its 4 examples of topics is less than half an example; give")


def test_classes_without_an_example_are_named(directory):
    labels = ["a"] * 20 + ["b"] * 20 + ["c"]
    assert warnings_of(directory, labels, dev=0.1) == [
        "DIR/train.csv: dev, a share of it, has no example of the class 'c', which has too few"
    ]
    assert warnings_of(directory, labels, dev="train.csv", classes=["c", "x", "b", "a", "y\n"]) == [
        "DIR/train.csv: no example of 2 classes, 'x', 'y\\n' in the training data"
    ]


def test_texts_of_a_dev_file_that_are_trained_on_are_counted(directory):
    write(directory / "train.csv", ["a", "b"])
    (directory / "dev.csv").write_text("message,topic\nnew,a\ntrain 1,a\ntrain 0,a\n")
    record = own_task(directory, dev="dev.csv")
    source = OwnTasks({"topics": record})
    task = source.complete(record)
    assert [source.load(task, split).file for split in ("train", "dev")] == [record.train, record.dev]
    (line,) = source.warnings(task)
    assert line.endswith("dev.csv: texts of 2 of the 3 dev examples are also trained on, the first on line 3")


@pytest.mark.parametrize(
    ("values", "labels"),
    [({}, ["3.1", "3.10", "3.2", "3.1"]), ({"type": "multilabel"}, ["3.1;3.2", "3.10", "3.2", "3.1"])],
)
def test_two_texts_that_are_one_number_are_told(directory, values, labels):
    line, *_ = warnings_of(directory, labels, dev="train.csv", **values)
    assert line == (
        "DIR/train.csv: the labels '3.1' and '3.10' are one class, the number 3.1; write them as texts that are no"
        " numbers if they are two"
    )


def test_a_separator_that_never_occurs_is_told(directory):
    (line,) = warnings_of(directory, ["a|b", "b", "c"], type="multilabel", dev="train.csv")
    assert line == (
        "DIR/train.csv: the separator ';' is in no label of column 'topic': each row has one label at most;"
        ' did you mean `separator: "|"`?'
    )
    assert warnings_of(directory, ["a|b", "b", "c"], type="multilabel", dev="train.csv", separator="|") == []


def test_a_scale_of_which_most_is_unused_gets_a_hint(directory):
    scores = {"type": "regression", "dev": "train.csv"}
    assert warnings_of(directory, [1, 2, 3], scale=[0, 10], **scores) == [
        "DIR/train.csv: the labels of topics are 1 to 3, so most of the scale 0 to 10 is unused; scale: [1, 3] may"
        " learn better"
    ]
    assert warnings_of(directory, [1, 2, 3], scale=[0, 4], **scores) == []


def test_inputs_of_a_prediction_are_read_like_the_training_file(directory):
    task = own_task(directory, text=["message", "answer"], classes=["a", "b"])
    content = 'answer,message,topic\n"yes, it\nis",Why?,unknown\n'
    (directory / "input.csv").write_text(content)
    examples = read_file(directory / "input.csv", task, labels="ignored", bare=True, option="--input")
    assert (list(examples.texts), list(examples.pairs), examples.labels) == (["Why?"], ["yes, it\nis"], None)
    (directory / "input").write_text("Why?\tyes\n")
    examples = read_file(directory / "input", task, labels="ignored", bare=True)
    assert (examples.texts, examples.pairs) == (["Why?"], ["yes"])
    with pytest.raises(UserError, match=r"--input .*none\.csv cannot be read \(No such file or directory\)"):
        read_file(directory / "none.csv", task, labels="ignored", bare=True, option="--input")


def test_own_tasks_take_the_place_of_built_in_ones(directory, course_data):
    write(directory / "train.csv", ["a", "b"] * 4)
    own = {name: own_task(directory, name) for name in ("sst", "topics")}
    source = open_source(str(course_data), own)
    assert source.tasks() == [*open_source(str(course_data)).tasks(), "topics"]
    assert source.complete(own["sst"]).classes == ("a", "b")
    assert source.complete(TASKS["qqp"]) is TASKS["qqp"]
    assert len(source.load(source.complete(own["sst"]), "train")) == 4
    assert source.load(TASKS["qqp"], "dev").ids == open_source(str(course_data)).load(TASKS["qqp"], "dev").ids
    assert (source.splits(own["sst"]), source.splits(TASKS["qqp"])) == (["train", "dev"], ["train", "dev"])
    assert (source.name, open_source(None, own).tasks()) == (f"{course_data} and train.csv", ["sst", "topics"])


@pytest.mark.parametrize("pair_encoding", ["cross-encoder", "bi-encoder", "both"])
def test_texts_on_disk_are_encoded_like_a_list_and_share_its_cache(directory, tmp_path, pair_encoding):
    (directory / "train.csv").write_text("a,b,topic\n" + "".join(f"one {i},two two {i},{i % 2}\n" for i in range(50)))
    record = own_task(directory, text=["a", "b"])
    source = OwnTasks({"topics": record})
    examples = source.load(source.complete(record), "train")
    listed = Examples(examples.ids, list(examples.texts), list(examples.pairs), examples.labels)
    tokenizer = Tokenizer.train(iter([*examples.texts, *examples.pairs]), 100)
    assert tokenizer.fingerprint == Tokenizer.train([*listed.texts, *listed.pairs], 100).fingerprint
    caches = [tmp_path / "one", tmp_path / "other"]
    encoded = [
        encode(each, tokenizer, 8, cache, pair_encoding=pair_encoding)
        for each, cache in zip((examples, listed), caches, strict=True)
    ]
    assert encoded[0].checksum == encoded[1].checksum
    names = [sorted(file.name for file in cache.iterdir()) for cache in caches]
    assert names[0] == names[1] != []


@pytest.mark.parametrize("pair_encoding", ["cross-encoder", "bi-encoder", "both"])
def test_encoding_holds_few_texts_in_memory(monkeypatch, directory, tmp_path, pair_encoding):
    count, size = 1000, 3000
    monkeypatch.setattr("minbert.data.tokenizer.CHUNK", 32)
    words = ["x" * size, "y" * size]  # one unknown token each
    texts, pairs = (TextColumn.of(f"{word}{number}" for number in range(count)) for word in words)
    examples = Examples([str(number) for number in range(count)], texts, pairs, None)
    tokenizer = Tokenizer.train(["some words"], 100)
    encode(examples.select(np.arange(2)), tokenizer, 8, tmp_path, pair_encoding=pair_encoding)  # imports
    tracemalloc.start()
    try:
        encoded = encode(examples, tokenizer, 8, tmp_path, pair_encoding=pair_encoding)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(encoded.token_ids) == {"cross-encoder": 5, "bi-encoder": 6, "both": 11}[pair_encoding] * count
    assert peak < count * size / 2
