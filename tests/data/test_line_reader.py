"""Lines and fields: what ends them, and what no reader can take."""

from __future__ import annotations

import csv
import io
import os
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.data import line_reader as module
from minbert.data.line_reader import read_lines, split_quoted
from minbert.errors import UserError


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("inside", ["\r", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\0", "\ufeff"])
def test_only_line_feeds_end_a_line(tmp_path, end, inside):
    path = tmp_path / "some.txt"
    path.write_bytes(f"one{inside}two{end}three{end}".encode())
    assert list(read_lines(path, "text")) == [f"one{inside}two", "three"]


def test_a_byte_order_mark_is_no_text_and_a_last_line_needs_no_end(tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    assert list(read_lines(path, "text")) == ["one", "", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\n".encode("utf-16"), r"some\.txt: UTF-16 text; convert the file to UTF-8"),
        ("ä\n".encode("utf-16-be"), r"some\.txt, line 1: not UTF-8 text; convert the file to UTF-8"),
        ("a\nä\n".encode("latin-1"), r"some\.txt, line 2: not UTF-8 text; convert the file to UTF-8"),
        (b"a\n\xed\xa0\x80\n", r"some\.txt, line 2: not UTF-8 text"),  # half a surrogate pair
        (b"a\rb\rc", r"some\.txt: its lines end with carriage returns alone; convert them to line feeds"),
        (b"a\n" + b"b" * 101, r"some\.txt, line 2: longer than 0 MiB; expected text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(module, "LONGEST_LINE", 100)
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_lines(path, "text"))


def test_a_path_that_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "absent", "No such file or directory"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "embedded null byte"),
        ("x" * 5000, "File name too long"),
    ):
        with pytest.raises(UserError, match=f"cannot read .*: {reason}; expected text"):
            list(read_lines(path, "text"))
        with pytest.raises(UserError, match=f"--input .*: cannot be read .{reason}"):
            list(read_lines(path, "text", option="--input"))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "some.txt"
    path.write_text("x")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "open", refuse, raising=False)
    with pytest.raises(UserError, match=r"cannot read .*some\.txt: Permission denied; expected text"):
        list(read_lines(path, "text"))


def test_pipes_and_standard_input_are_read_where_they_may_be(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"one\ntwo\n",))
    writer.start()
    assert list(read_lines(pipe, "text", pipes=True)) == ["one", "two"]
    writer.join()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ä\u2028b\r\nc".encode()), "ascii"))
    assert list(read_lines("-", "text", pipes=True)) == ["ä\u2028b", "c"]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="cannot read standard input: it is closed"):
        list(read_lines("-", "text", pipes=True))


fields = st.lists(st.text(st.sampled_from('ab" ,\t\r\x0c'), max_size=6), min_size=1, max_size=4)


@given(fields, st.sampled_from("\t,"), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_what_csv_writes_is_split_as_csv_reads_it(row, delimiter, quoting):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="", quoting=quoting).writerow(row)
    assert split_quoted(file.getvalue(), delimiter) == (row, "")


@given(st.text(st.sampled_from('ab"\t'), max_size=12))
def test_any_line_is_split_as_csv_splits_it_or_has_a_problem(line):
    fields, problem = split_quoted(line)
    try:
        expected = next(csv.reader([line], delimiter="\t", strict=True)) if line else [""]
    except csv.Error:
        assert "is a quote unbalanced?" in problem
    else:
        assert (fields, problem) == (expected, "")


@given(st.lists(st.text(st.sampled_from('a"\n,'), max_size=8), min_size=2, max_size=4))
def test_a_quoted_field_may_span_lines_where_they_are_given(row):
    file = io.StringIO()
    csv.writer(file, lineterminator="", quoting=csv.QUOTE_ALL).writerow(row)
    first, *more = file.getvalue().split("\n")
    following = iter([*more, "next"])
    assert split_quoted(first, ",", following) == (row, "")
    assert list(following) == ["next"]


def test_fields_before_a_problem_and_fields_of_any_length_are_there():
    assert split_quoted('7\ta "b"\t"c\td') == (["7", 'a "b"'], split_quoted('"')[1])
    assert split_quoted('7\t"c"d\te')[0] == ["7"]
    long = "x" * 200_000  # the csv module refuses more than 131,072 characters
    assert split_quoted(f'"{long}"\t{long}') == ([long, long], "")


def test_a_quote_that_is_never_closed_costs_no_memory(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_RECORD", 1000)
    following = iter(["x" * 100] * 1000)
    assert "a quote is not closed" in split_quoted('"x', ",", following)[1]
    assert len(list(following)) >= 989
