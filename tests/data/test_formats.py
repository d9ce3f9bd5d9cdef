"""Reading the course's and GLUE's files: what is kept, what is skipped and said, and what is refused."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data import (
    Examples,
    Skipped,
    read_examples,
    read_file,
    read_glue,
    read_skipped,
    skipped_lines,
    skipped_rows,
    update_skipped,
    write_skipped,
)
from minbert.errors import UserError
from minbert.tasks import TASKS

SST, QQP, STS = TASKS["sst"], TASKS["qqp"], TASKS["sts"]
QUORA_HEADER = "\tid\tsentence1\tsentence2\tis_duplicate"

texts = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"))).filter(lambda text: text.strip())


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines: str, name: str = "some.csv", end: str = "\n") -> Path:
        path = tmp_path / name
        path.write_bytes("".join(line + end for line in lines).encode())
        return path

    return write_lines


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)


@given(st.lists(st.tuples(texts, texts, st.sampled_from(["0", "1", "1.0"])), min_size=1, max_size=5))
def test_what_csv_wrote_is_read_back_stripped(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "quora.csv"
    write_csv(path, [QUORA_HEADER.split("\t"), *([str(i), f"q{i}", *row] for i, row in enumerate(rows))])
    examples = read_examples(path, QQP)
    assert examples.texts == [first.strip() for first, _, _ in rows]
    assert examples.pairs == [second.strip() for _, second, _ in rows]
    assert examples.labels.tolist() == [float(label) for _, _, label in rows]
    assert examples.ids == [f"q{i}" for i in range(len(rows))]
    assert examples.skipped == []


def test_columns_are_found_by_name_wherever_they_stand(write):
    plain = read_examples(write("\tid\tsentence\tsentiment", "0\ta\tgood film\t3"), SST)
    turned = read_examples(write("sentiment\tsentence\textra\tid", "3.0\tgood film\tx\ta"), SST)
    assert plain.ids == turned.ids == ["a"]
    assert plain.texts == turned.texts == ["good film"]
    assert plain.labels.dtype == np.float32
    assert plain.labels.tolist() == turned.labels.tolist() == [3]


def test_a_file_without_labels_with_two_index_columns_is_read(write):
    path = write("0\t\tid\tsentence", "1\t0.0\tx\tfirst", "2\t1.0\ty\tsecond", name="ids-sst-test-student.csv")
    examples = read_examples(path, SST)
    assert (examples.ids, examples.texts, examples.labels) == (["x", "y"], ["first", "second"], None)


def test_line_ends_byte_order_mark_and_blank_lines_do_not_matter(write):
    path = write("\ufeff\tid\tsentence\tsentiment", "0\ta\tgood film\t3", "", "1\tb\tbad film\t1", end="\r\n")
    examples = read_examples(path, SST)
    assert examples.texts == ["good film", "bad film"]
    assert examples.skipped == []


def test_characters_that_only_unicode_calls_line_breaks_stay_in_the_text(write):
    assert read_examples(write("id\tsentence\tsentiment", "a\tone\u2028two\x0bthree\t2"), SST).texts == [
        "one\u2028two\x0bthree"
    ]


def test_quotes_inside_the_quoting_are_kept(write):
    path = write(QUORA_HEADER, '0\ta\t"""Who said """"no""""?"""\t" """""" And why ?"\t1.0')
    examples = read_examples(path, QQP)
    assert examples.texts == ['"Who said ""no""?"']
    assert examples.pairs == ['""" And why ?']


def test_repeated_ids_are_fine(write):
    assert read_examples(write("id\tsentence\tsentiment", "a\tone\t1", "a\ttwo\t2"), SST).ids == ["a", "a"]


def test_without_an_id_column_ids_are_row_numbers_that_skipping_does_not_shift(write):
    examples = read_examples(write("sentence\tsentiment", "one\t1", "two\tx", "three\t2"), SST)
    assert examples.ids == ["0", "2"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("9\tz\twhy ?\thow ?\t", "no label"),
        ("9\tz\twhy ?\thow ?\tyes", "label 'yes' is not a number"),
        ("9\tz\twhy ?\thow ?\t2.0", "label 2.0 is outside 0 to 1"),
        ("9\tz\twhy ?\thow ?\t-1", "label -1 is outside 0 to 1"),
        ("9\tz\twhy ?\thow ?\tnan", "label nan is outside 0 to 1"),
        ("9\tz\twhy ?\thow ?\t0.5", "label 0.5 is not a whole number"),
        ("9\tz\twhy ?\thow ?\t1_0", "label '1_0' is not a number"),
        ("9\tz\twhy ?\t \t1.0", "empty text"),
        ("9\tz\t \t \t ", "empty text"),
        ("9\tz\twhy\0?\thow ?\t1.0", "a NUL character"),
        ("9\tz\twhy ?\t1.0", "expected 5 fields, found 4"),
        ("9\tz\twhy ?\thow ?\t1.0\t1.0", "expected 5 fields, found 6"),
        ('9\tz\t"why ?\thow ?\t1.0', "is a quote unbalanced?"),
        ('9\tz\twhy ?\t"how ?\t1.0', "is a quote unbalanced?"),
        ('9\tz\twhy ?\thow ?\t"1.0', "is a quote unbalanced?"),
    ],
)
def test_a_bad_row_is_skipped_with_its_line_and_costs_no_other_row(write, row, reason):
    good = [f"{i}\tq{i}\twhat ?\twho ?\t{i % 2}.0" for i in range(4)]
    path = write(QUORA_HEADER, *good[:2], row, *good[2:])
    examples = read_examples(path, QQP)
    assert examples.ids == ["q0", "q1", "q2", "q3"]
    (skipped,) = examples.skipped
    assert (skipped.file, skipped.line, skipped.id) == (str(path), 4, "z")
    assert reason in skipped.reason


def test_a_regression_takes_any_number_in_its_range(write):
    path = write("id\tsentence1\tsentence2\tsimilarity", "a\tx\ty\t2.583", "b\tx\ty\t5.0", "c\tx\ty\t5.1")
    examples = read_examples(path, STS)
    assert examples.labels.tolist() == pytest.approx([2.583, 5.0])
    assert examples.skipped == [Skipped(str(path), 4, "label 5.1 is outside 0 to 5")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "{path} is empty; expected a header and rows"),
        (["", " "], "{path} is empty; expected a header and rows"),
        (["id\tsentence\tsentiment"], "{path} has no rows under its header; expected examples of SST-5 sentiment"),
        (
            ["id\ttext\tsentiment", "a\tb\t1"],
            "{path}, line 1: no column 'sentence' in the header; found id, text, sent",
        ),
        (
            ["id\tsentence\tlabel", "a\tb\t1"],
            "{path}, line 1: no column 'sentiment' in the header; found id, sentence, ",
        ),
        (['id\t"sentence', "a\tb"], "{path}, line 1: cannot read the header: "),
        (
            ["id\tsentence\tsentence\tsentiment", "a\tb\tc\t1"],
            "{path}, line 1: the header has the column 'sentence' twice",
        ),
        (["id\tsentence\tid\tsentiment", "a\tb\tc\t1"], "{path}, line 1: the header has the column 'id' twice"),
        (
            ["id,sentence,sentiment", "a,b,1"],
            "{path}, line 1: a header separated by ','; expected columns separated by tabs",
        ),
        (["i\0d\0", "a"], "{path}, line 1: no column 'sentence' in the header; found i\\x00d\\x00"),
        (
            ["id\tsentence\tsentiment", "a\tb\t7", "a\tb\t"],
            "{path}: none of its 2 rows is usable; line 2: label 7 is ",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(write, lines, message):
    path = write(*lines)
    with pytest.raises(UserError) as caught:
        read_examples(path, SST, labels="required")
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8_is_refused_with_the_line(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("id\tsentence\tsentiment\na\tgood\t3\nb\tcafé\t3\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv, line 3: not UTF-8 text; convert the file to UTF-8"):
        read_examples(path, SST)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory; expected a tab-separated file"):
        read_examples(tmp_path, SST)
    with pytest.raises(UserError, match=r"cannot read .*absent\.csv: No such file"):
        read_examples(tmp_path / "absent.csv", SST)


def test_glue_has_no_quoting(write):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    examples = read_glue(write(header, '7\t1\t2\t"Who?\tWhat "now"?\t1', "8\t1\t2\tWho?"), QQP)
    assert (examples.ids, examples.texts, examples.pairs) == (["7"], ['"Who?'], ['What "now"?'])
    assert [skipped.line for skipped in examples.skipped] == [3]


def test_glue_ids_come_from_the_index_or_the_row(write):
    assert read_glue(write("index\tsentence", "5\tgood"), TASKS["sst2"]).ids == ["5"]
    assert read_glue(write("sentence\tlabel", "good\t1", "bad\t0"), TASKS["sst2"]).ids == ["0", "1"]


def test_names_and_fields_may_be_quoted_and_have_blanks_around_them(write):
    path = write('"id"\t" sentence "\tsentiment ', '"a"\t"good film"\t" 3"')
    examples = read_examples(path, SST, labels="required")
    assert (examples.ids, examples.texts, examples.labels.tolist()) == (["a"], ["good film"], [3])


def test_a_row_of_tabs_is_a_row_and_a_blank_line_is_none(write):
    examples = read_examples(write("id\tsentence\tsentiment", "a\tone\t1", "\t\t", "", "  ", "b\ttwo\t2"), SST)
    assert examples.ids == ["a", "b"]
    assert [(row.line, row.reason) for row in examples.skipped] == [(3, "empty text")]


def test_labels_that_are_kept_back_are_none(write):
    for hidden in ("", "-1", "-1.0"):
        path = write("id\tsentence\tsentiment", f"a\tone\t{hidden}", f"b\ttwo\t{hidden}")
        assert read_examples(path, SST).labels is None
        with pytest.raises(UserError, match="none of its 2 rows is usable"):
            read_examples(path, SST, labels="required")
    half = read_examples(write("id\tsentence\tsentiment", "a\tone\t", "b\ttwo\t2"), SST)
    assert (half.ids, half.labels.tolist(), half.skipped[0].id) == (["b"], [2], "a")


# Which format a file is in ------------------------------------------------------------------------------------------

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


def test_a_list_of_rows_is_replaced_file_by_file_and_read_back(tmp_path):
    path = tmp_path / "skipped.jsonl"
    assert read_skipped(path) == []
    rows = skipped_rows("train", "sst", [Skipped("b.csv", 9, "r", "i"), Skipped("b.csv", 3, "r"), Skipped("a", 1, "r")])
    rows += skipped_rows(
        "dev", "sst", [Skipped("b.csv", 2, "r\u2028", "\ud800" + "x" * 1000), Skipped("\udcff", 1, "r")]
    )
    write_skipped(path, rows)
    back = read_skipped(path)
    assert [(row.split, row.file, row.line) for row in back] == [
        ("train", "a", 1),
        ("train", "b.csv", 3),
        ("train", "b.csv", 9),
        ("dev", "\\udcff", 1),
        ("dev", "b.csv", 2),
    ]
    assert back[4].id == "\\ud800" + "x" * 198 + "…"
    update_skipped(
        path, "train", {("sst", "./b.csv"), ("sts", "a")}, skipped_rows("train", "sst", [Skipped("b.csv", 4, "r")])
    )
    assert [(row.split, row.file, row.line) for row in read_skipped(path)] == [
        ("train", "a", 1),
        ("train", "b.csv", 4),
        ("dev", "\\udcff", 1),
        ("dev", "b.csv", 2),
    ]
    write_skipped(path, [])
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_rows_that_are_left_out_says_how_many_and_which(write):
    rows = [f"a{i}\t" for i in range(7)]
    skipped = read_file(write("id\tsentence", "z\tgood", *rows), SST).skipped
    assert [line.replace(skipped[0].file, "FILE") for line in skipped_lines(skipped, "see RUN")] == [
        "warning: 7 rows of FILE left out:",
        *(f"  line {i + 3}, id a{i}: empty text" for i in range(5)),
        "  and 2 more: see RUN",
    ]
    odd = Skipped("some\nfile", 3, "empty text", "\x1b[31m" + "x" * 100)
    assert skipped_lines([odd], "") == [
        "warning: 1 row of some\\nfile left out:",
        "  line 3, id \\x1b[31m" + "x" * 34 + "…: empty text",
    ]


def test_examples_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="pairs has 1 entries for 2 ids"):
        Examples(["a", "b"], ["x", "y"], ["z"], None)


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
    path = Path(os.environ["MINBERT_TEST_DATA"]) / task.files[split]
    examples = read_examples(path, task)
    assert [(skipped.line, skipped.reason) for skipped in examples.skipped] == COURSE_SKIPPED.get((name, split), [])
    assert len(examples) + len(examples.skipped) == COURSE_ROWS[name, split] == path.read_bytes().count(b"\n") - 1
    assert (examples.labels is None) == (split == "test")
    assert (examples.pairs is not None) == task.is_pair
    assert len({len(identity) for identity in examples.ids}) == 1
