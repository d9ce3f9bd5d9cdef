"""Training examples made out of others: nothing changes its label, nothing comes from the dev split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from own_task import own_task

from minbert.data import Examples, TextColumn, joined, open_source, read_augmented, read_examples, swapped
from minbert.errors import UserError
from minbert.tasks import TASKS

SST, STS = TASKS["sst"], TASKS["sts"]
ORIGINALS = Examples(["a", "b"], ["a good film", "a bad film"], None, np.array([3, 1], np.float32))
PAIRS = Examples(["p", "q"], ["a cat", "a dog"], ["one cat", "a car"], np.array([5, 0.5], np.float32))


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_swapping_pairs_twice_gives_them_back_with_their_labels():
    once = swapped(PAIRS)
    assert (once.texts, once.pairs) == (PAIRS.pairs, PAIRS.texts)
    twice = swapped(once)
    assert (twice.ids, twice.texts, twice.pairs) == (PAIRS.ids, PAIRS.texts, PAIRS.pairs)
    np.testing.assert_array_equal(twice.labels, PAIRS.labels)


def test_joined_examples_keep_their_labels():
    both = joined(PAIRS, swapped(PAIRS))
    assert len(both) == 4
    rows = set(zip(both.texts, both.pairs, both.labels.tolist(), strict=True))
    assert {("a cat", "one cat", 5.0), ("one cat", "a cat", 5.0), ("a dog", "a car", 0.5)} < rows
    assert joined(ORIGINALS, ORIGINALS).pairs is None


ROWS = [("a", "a fine film", "3"), ("b", "a poor film", "")]


def test_both_formats_read_alike_and_take_missing_labels_from_the_original(tmp_path):
    table = write(tmp_path / "more.csv", "\tid\tsentence\tsentiment", *("\t".join(["0", *row]) for row in ROWS))
    objects = [{"id": i, "sentence": s, **({"sentiment": int(label)} if label else {})} for i, s, label in ROWS]
    lines = write(tmp_path / "more.jsonl", *map(json.dumps, objects))
    bare = write(tmp_path / "bare.csv", "sentence\tid", *(f"{text}\t{i}" for i, text, _ in ROWS))
    for file in (table, lines, bare):
        examples = read_augmented(file, SST, ORIGINALS)
        assert (examples.ids, examples.texts) == (["a", "b"], ["a fine film", "a poor film"])
        assert examples.labels.tolist() == [3, 1]


def test_new_examples_need_no_original_but_a_label(tmp_path):
    file = write(tmp_path / "more.jsonl", '{"sentence": "splendid", "sentiment": 4}', '{"sentence": "?"}')
    with pytest.raises(UserError, match=r"more\.jsonl, line 2: no label, nor a training example with the id ''"):
        read_augmented(file, SST, ORIGINALS)
    assert read_augmented(write(file, '{"sentence": "splendid", "sentiment": 4}'), SST, ORIGINALS).labels.tolist() == [
        4
    ]


def test_what_says_nothing_new_is_left_out_and_noted(tmp_path):
    file = write(tmp_path / "more.csv", "id\tsentence", "a\t a good film ", "b\t", "b\ta good film", "", "a\tsplendid")
    examples = read_augmented(file, SST, ORIGINALS)
    assert examples.texts == ["a good film", "splendid"]
    assert [(row.line, row.reason) for row in examples.skipped] == [(2, "the same as its original"), (3, "empty text")]


def test_pairs_can_be_augmented_too(tmp_path):
    file = write(tmp_path / "more.csv", "id\tsentence1\tsentence2", "p\ta cat\ta single cat", "p\ta cat\tone cat")
    examples = read_augmented(file, STS, PAIRS)
    assert (examples.texts, examples.pairs, examples.labels.tolist()) == (["a cat"], ["a single cat"], [5.0])


def test_originals_with_one_id_and_several_labels_give_none(tmp_path):
    originals = Examples(["a", "a"], ["a good film", "a bad film"], None, np.array([3, 1], np.float32))
    with pytest.raises(UserError, match="line 2: no label, and the training examples with the id 'a' have 1 and 3"):
        read_augmented(write(tmp_path / "more.csv", "id\tsentence", "a\tfine"), SST, originals)
    file = write(tmp_path / "more.csv", "id\tsentence\tsentiment", "a\tfine\t3", "a\tpoor\t1", "a\ta bad film\t1")
    examples = read_augmented(file, SST, originals)
    assert examples.labels.tolist() == [3, 1]
    assert [(row.line, row.id) for row in examples.skipped] == [(4, "a")]


def test_files_are_told_apart_as_everywhere(tmp_path):
    file = write(tmp_path / "more.tsv", "id\tsentence1\tsentence2", 'p\t"a cat\t"a single cat"')
    examples = read_augmented(file, STS, PAIRS)
    assert (examples.texts, examples.pairs) == (['"a cat'], ['"a single cat"'])
    assert read_augmented(
        write(tmp_path / "more.jsonl", '{"sentence": "x", "sentiment": 1}'),
        SST,
        Examples(["0"], ["y"], None, np.array([2])),
    ).labels.tolist() == [1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id\tsentence\tsentiment", "a\tfine\t3", "a\tfine\t2"], r"line 3: label 2 differs from its original's, 3"),
        (["id\tsentence", "a\tfine", "c\tfine"], "line 3: no label, nor a training example with the id 'c'"),
        (["id\tsentence\tsentiment", "c\tfine\t7"], "line 2: label 7 is outside 0 to 4"),
        (["id\tsentence\tsentiment", "dev\tfine\t3"], "line 2: dev is an example of the dev split"),
        (["id\tsentence", "a\tb\tc"], "line 2: expected 2 fields, found 3"),
        (["id\ttext", "a\tb"], "line 1: no column 'sentence' in the header; found id, text"),
        (["id\tsentence", "a\ta good film"], "has no example that is not in the training data"),
        (['{"id": "a", "sentence": "fine"}', '{"id": "a", "sent'], r"line 2: not JSON: Unterminated string"),
        (['{"id": "a", "text": "fine"}'], "line 1: expected text for sentence; found id, text"),
        (['{"id": "a", "sentence": "fine"}', "[]"], "line 2: expected a JSON object, got a list"),
        ([""], "is empty; expected a header and rows"),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, lines, message):
    file = write(tmp_path / "more.csv", *lines)
    with pytest.raises(UserError, match=message) as caught:
        read_augmented(file, SST, ORIGINALS, held_out={"dev"})
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent\.csv: No such file"):
        read_augmented(tmp_path / "absent.csv", SST, ORIGINALS)


def test_the_training_file_itself_adds_nothing(course_data):
    path = course_data / "ids-sst-train.csv"
    with pytest.raises(UserError, match="no example that is not in the training data"):
        read_augmented(path, SST, read_examples(path, SST))


def test_files_of_own_tasks_are_read_in_the_format_of_their_name(tmp_path):
    record = own_task(tmp_path, type="multilabel", classes=["x", "y"], separator="|")
    write(tmp_path / "train.csv", "id,message,topic", '1,"a\nb",x|y', "2,c,", "3,d,y")
    originals = open_source(None, {"topics": record}).load(replace(record, dev=None), "train")
    file = write(tmp_path / "more.csv", "id,message,topic", '1,"a, b",', "2,cc,", "3,dd,y", '1,"a\nb",', "9,new,x")
    more = read_augmented(file, record, originals)
    assert (more.ids, more.texts) == (["1", "2", "3", "9"], ["a, b", "cc", "dd", "new"])
    assert more.labels.tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]
    assert [(row.line, row.reason) for row in more.skipped] == [(5, "the same as its original")]
    both = joined(originals, more)
    assert isinstance(both.texts, TextColumn)
    assert list(both.texts) == [*originals.texts, *more.texts]
    assert (both.ids, both.labels.shape) == ([*originals.ids, *more.ids], (7, 2))
    with pytest.raises(UserError, match=r"line 2: label 'x' differs from its original's, 'y' \(id 3\)"):
        read_augmented(write(file, "id,message,topic", "3,dd,x"), record, originals)
    lines = write(tmp_path / "more.jsonl", '{"id": 3, "message": 5}')
    with pytest.raises(UserError, match=r"more\.jsonl, line 1: expected text, got a number"):
        read_augmented(lines, record, originals)


def test_pairs_on_disk_are_swapped_and_joined(tmp_path):
    record = own_task(tmp_path, text=["one", "other"])
    write(tmp_path / "train.csv", "one,other,topic", "a,b,x", "c,d,y")
    source = open_source(None, {"topics": record})
    examples = source.load(replace(source.complete(record), dev=None), "train")
    both = joined(examples, swapped(examples))
    assert (list(both.texts), list(both.pairs)) == (["a", "c", "b", "d"], ["b", "d", "a", "c"])
    assert both.labels.tolist() == [0, 1, 0, 1]
