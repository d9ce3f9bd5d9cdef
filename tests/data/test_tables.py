"""Tables of the course and of GLUE: which rows are kept, skipped with a reason, and refused."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data import Skipped, read_examples, read_glue
from minbert.errors import UserError
from minbert.tasks import TASKS

SST, QQP, STS = TASKS["sst"], TASKS["qqp"], TASKS["sts"]
QUORA_HEADER = "\tid\tsentence1\tsentence2\tis_duplicate"

texts = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"))).filter(lambda text: text.strip())


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
