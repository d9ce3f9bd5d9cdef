"""A file's name and first line decide its format; every line is a row, blank, or skipped with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data import read_examples, read_file
from minbert.errors import UserError
from minbert.tasks import TASKS

SST, QQP, STS = TASKS["sst"], TASKS["qqp"], TASKS["sts"]

QUOTED_PAIR = '"We won"\tThey won.'
GLUE_STS = ("index\tgenre\tsentence1\tsentence2", f"0\tnews\t{QUOTED_PAIR}", '1\tnews\t"We won, he said.\tThey won.')
COURSE_STS = ("\tid\tsentence1\tsentence2", f"0\ta\t{QUOTED_PAIR}")


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("task", "name", "lines", "first", "skipped"),
    [
        (STS, "test.tsv", GLUE_STS, '"We won"', 0),
        (STS, "test", GLUE_STS, '"We won"', 0),
        (STS, "test.csv", GLUE_STS, "We won", 1),
        (STS, "test.csv", COURSE_STS, "We won", 0),
        (STS, "test.txt", COURSE_STS, "We won", 0),
        (STS, "test.TSV", COURSE_STS, '"We won"', 0),
        (QQP, "test.tsv", ("id\tquestion1\tquestion2", f"0\t{QUOTED_PAIR}"), '"We won"', 0),
        (QQP, "test.txt", ("id\tquestion1\tquestion2", f"0\t{QUOTED_PAIR}"), '"We won"', 0),
        (QQP, "test.txt", ("id\tsentence1\tsentence2", f"0\t{QUOTED_PAIR}"), "We won", 0),
        (SST, "test.tsv", ("sentence", '"We won"'), "We won", 0),
        (TASKS["sst2"], "test.txt", ("index\tsentence", '0\t"We won"'), '"We won"', 0),
        (STS, "some.txt", ("", '{"sentence1": "We won", "sentence2": "b"}', ""), "We won", 0),
        (STS, "some.jsonl", ("{", '{"sentence1": "We won", "sentence2": "b"}'), "We won", 1),
        (QQP, "some.jsonl", ('{"question1": "We won", "question2": "b", "is_duplicate": 1}',), "We won", 0),
    ],
)
def test_name_and_first_line_say_the_format(write, bare, task, name, lines, first, skipped):
    examples = read_file(write(*lines, name=name), task, bare=bare)
    assert examples.texts[0] == first
    assert len(examples.skipped) == skipped


def test_bare_lines_have_their_numbers_and_every_one_is_there_or_named(write):
    path = write("first", "", "third \f\u2028 one", '"quoted', "two\tfields", "a\0b", name="some.txt")
    examples = read_file(path, SST, bare=True)
    assert dict(zip(examples.ids, examples.texts, strict=True)) == {
        "0": "first",
        "2": "third \f\u2028 one",
        "3": '"quoted',
    }
    assert [(row.line, row.id) for row in examples.skipped] == [(2, "1"), (5, "4"), (6, "5")]
    assert [row.reason[:14] for row in examples.skipped] == ["empty text", "expected a sen", "a NUL characte"]
    pairs = read_file(write("a\tb", "c", " \td", "e\tf\tg", '"h\ti"', name="pairs"), STS, bare=True)
    assert (pairs.texts, pairs.pairs, pairs.ids) == (["a", '"h'], ["b", 'i"'], ["0", "4"])
    assert [row.reason for row in pairs.skipped] == [
        "expected a pair of sentences separated by a tab, got 1 field",
        "empty text",
        "expected a pair of sentences separated by a tab, got 3 fields",
    ]


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        (SST, ["id,sentence", "a,good"], "line 1: a header separated by ','; expected columns separated by tabs"),
        (STS, ['"id";"sentence1";"sentence2"', "a;b;c"], "line 1: a header separated by ';'"),
        (STS, ["id\tpremise", "a\tgood"], "line 1: no column 'sentence1' in the header; found id, premise"),
        (STS, ["sentence1\ttext", "a\tgood"], "line 1: no column 'sentence2' in the header"),
    ],
)
def test_a_header_is_not_taken_for_a_sentence(write, task, lines, message):
    with pytest.raises(UserError, match=message):
        read_file(write(*lines, name="some.txt"), task, bare=True)


def test_a_sentence_with_commas_is_not_taken_for_a_header(write):
    assert len(read_file(write("A word, sentence, or id, please", name="some.txt"), SST, bare=True)) == 1


def test_json_objects_of_any_values_are_rows_or_named(write):
    path = write(
        '{"id": 7, "sentence": "good", "sentiment": 3}',
        '{"sentence": "fine", "sentiment": "2"}',
        '{"id": "c", "sentence": null, "sentiment": 1}',
        '{"id": "d", "sentence": ["x"], "sentiment": 1}',
        '{"id": {"a": 1}, "sentence": "x", "sentiment": 1}',
        '{"id": "a\\nb", "sentence": "x", "sentiment": 1}',
        '{"id": "e", "sentence": "\\ud800", "sentiment": 1}',
        '{"id": "f", "sentence": "x", "sentiment": true}',
        '{"id": "g", "sentence": "x", "sentiment": NaN}',
        '{"id": "h", "sentence": "x", "sentence": "y", "sentiment": 1}',
        "",
        '{"id": "i", "text": "x"}',
        "[" * 10_000,
        name="some.jsonl",
    )
    examples = read_file(path, SST)
    assert (examples.ids, examples.labels.tolist()) == (["7", "1"], [3, 2])
    found = [(row.line, row.id, row.reason) for row in examples.skipped]
    assert [line for line, _, _ in found] == [3, 4, 5, 6, 7, 8, 9, 10, 12, 13]
    for (_, identity, reason), (expected, part) in zip(
        found,
        [
            ("c", "expected text for sentence, got null"),
            ("d", "expected text for sentence, got a list"),
            ("4", "expected text or a number for id, got an object"),
            ("a\nb", "its id contains a line break"),
            ("e", "half a surrogate pair"),
            ("f", "label 'True' is not a number"),
            ("g", "label nan is outside"),
            ("9", "key 'sentence' twice in an object"),
            ("i", "expected text for sentence; found id, text"),
            ("12", "nested too deeply"),
        ],
        strict=True,
    ):
        assert identity == expected
        assert part in reason
        assert "\n" not in reason


@given(
    st.sampled_from(["id\tsentence", "sentence", "sentence\tid", "bare"]),
    st.lists(st.text(st.sampled_from('ab \t"\r\f\0\u2028{}'), max_size=6), max_size=6),
)
def test_every_line_is_a_row_or_is_named_or_is_blank(tmp_path_factory, header, lines):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes("\n".join([header, *lines, ""]).encode())
    try:
        examples = read_file(path, SST, labels="ignored", bare=True)
    except UserError as error:
        assert "usable" in str(error) or "no rows under its header" in str(error)  # noqa: PT017
        return
    rows = [line for line in lines if line.strip() or "\t" in line or "\t" not in header]
    assert len(examples) + len(examples.skipped) == len(rows) + (header == "bare")


BYTES = st.sampled_from(
    [
        b"a",
        b"1",
        b"\t",
        b"\n",
        b"\r",
        b"\r\n",
        b'"',
        b",",
        b"{",
        b"}",
        b"\0",
        b"\xff",
        b"\xc2\x85",
        b"\xe2\x80\xa8",
        b" ",
    ]
)


@given(
    st.sampled_from([SST, STS]),
    st.sampled_from(["x.csv", "x.tsv", "x.jsonl", "x"]),
    st.sampled_from(
        [b"", b"id\tsentence\tsentiment\n", b"index\tsentence1\tsentence2\tscore\n", b"\xef\xbb\xbf", b"\xff\xfe"]
    ),
    st.lists(BYTES, max_size=30),
    st.sampled_from(["required", "optional", "ignored"]),
    st.booleans(),
)
def test_any_bytes_are_rows_or_one_line_says_why_not(tmp_path_factory, task, name, start, parts, labels, bare):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(start + b"".join(parts))
    try:
        examples = read_file(path, task, labels=labels, bare=bare)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    assert len(examples) + len(examples.skipped) <= len(lines)
    assert all(text and text == text.strip() for text in (*examples.texts, *(examples.pairs or ())))
    assert all(row.reason and 1 <= row.line <= len(lines) for row in examples.skipped)


COURSE_ROWS = {
    ("sst", "train"): 8544,
    ("sst", "dev"): 1101,
    ("sst", "test"): 2210,
    ("qqp", "train"): 15797,
    ("qqp", "dev"): 2216,
    ("sts", "train"): 6040,
    ("sts", "dev"): 863,
    ("sts", "test"): 1725,
    ("cfimdb", "train"): 1707,
    ("cfimdb", "dev"): 245,
    ("cfimdb", "test"): 488,
}
COURSE_SKIPPED = {("qqp", "train"): [(2035, "no label"), (11110, "empty text")]}


@pytest.mark.skipif("MINBERT_TEST_DATA" not in os.environ, reason="MINBERT_TEST_DATA is not set")
@pytest.mark.parametrize(("name", "split"), COURSE_ROWS)
def test_every_line_of_the_course_files_is_a_row_or_is_named(name, split):
    task = TASKS[name]
    path = Path(os.environ["MINBERT_TEST_DATA"]) / task.course.files[split]
    examples = read_examples(path, task)
    assert [(skipped.line, skipped.reason) for skipped in examples.skipped] == COURSE_SKIPPED.get((name, split), [])
    assert len(examples) + len(examples.skipped) == COURSE_ROWS[name, split] == path.read_bytes().count(b"\n") - 1
    assert (examples.labels is None) == (split == "test")
    assert (examples.pairs is not None) == task.is_pair
    assert len({len(identity) for identity in examples.ids}) == 1
