"""Data with rows that cannot be used in every split."""

from __future__ import annotations

import json
from pathlib import Path

NOUNS = ["film", "meal", "book", "song", "hotel", "garden", "train", "game"]
QUOTED = '"We won, he said.'  # a quote that GLUE's files have and the course's cannot


def course_file(path: Path, header: str, rows: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in (header, *rows)))


def write_data(directory: Path) -> Path:
    """sst in the course's format and sts and qqp in GLUE's, with bad rows in every split."""
    good = {split: [f"{split}{i}\tthe {noun} was fine ." for i, noun in enumerate(NOUNS)] for split in ("tr", "de")}
    bad = ["e1\t \t2", 'e2\t"a quote\t3', "e3\tgood\tpositive", "e4\tgood\t9"]
    for split, name in (("tr", "train"), ("de", "dev")):
        rows = [f"{row}\t{i % 5}" for i, row in enumerate(good[split])]
        course_file(directory / f"ids-sst-{name}.csv", "id\tsentence\tsentiment", [*rows[:3], *bad, *rows[3:]])
    test = [f"te{i}\tthe {noun} was fine ." for i, noun in enumerate(NOUNS)] + ["x1\tone", "x2\ttwo"]
    course_file(directory / "ids-sst-test-student.csv", "id\tsentence", [*test[:5], "e5\t ", 'e6\t"a quote', *test[5:]])
    for folder, columns, label in (
        ("STS-B", "index\tgenre\tsentence1\tsentence2", "score"),
        ("QQP", "id\tqid\tquestion1\tquestion2", "is_duplicate"),
    ):
        (directory / folder).mkdir()
        rows = [f"{i}\tx\t{QUOTED if i == 3 else f'a {noun} here'}\tthey won ." for i, noun in enumerate(NOUNS)]
        for split in ("train", "dev"):
            lines = [f"{row}\t{i % 2}" for i, row in enumerate(rows)]
            course_file(directory / folder / f"{split}.tsv", f"{columns}\t{label}", [*lines, "8\tx\tone\t\t1"])
        course_file(directory / folder / "test.tsv", columns, [*rows, "8\tx\tone"])
    return directory


def listed(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
