"""The list of skipped rows, in a file and on the terminal."""

from __future__ import annotations

from minbert.data import (
    Skipped,
    read_file,
    read_skipped,
    skipped_lines,
    skipped_rows,
    update_skipped,
    write_skipped,
)
from minbert.tasks import TASKS

SST = TASKS["sst"]


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
