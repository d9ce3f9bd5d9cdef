"""Reading a user's CSV file: rows checked, labels encoded, a dev share held out, and texts on disk."""

from __future__ import annotations

import csv
import random
import tempfile
from pathlib import Path

from minbert.data import open_source
from minbert.tasks import Task

WORDS = ("red", "green", "blue", "cat", "dog", "fish", "sun", "moon", "rain", "snow", "river", "mountain")


def write_rows(path: Path, rows: int) -> None:
    """An id, a text of about 100 characters with a comma and quotes, and one of five labels in each row."""
    draw = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["id", "text", "label"])
        for number in range(rows):
            text = f'{" ".join(draw.choices(WORDS, k=18))}, "{number}"'
            lines.writerow([number, text, draw.choice("abcde")])


def read(path: Path) -> int:
    """Read the training and the dev examples, as a run does; return their number."""
    task = Task("reading", ("text",), "label", train=str(path), dev=0.1)
    source = open_source(None, {task.name: task})
    task = source.complete(task)
    return sum(len(source.load(task, split)) for split in ("train", "dev"))


def split_fields(path: Path) -> int:
    """What any reader in Python needs at least: csv's records, which are not kept."""
    with open(path, newline="", encoding="utf-8") as file:
        return sum(1 for _ in csv.reader(file)) - 1


def read_with_datasets(path: Path) -> int:
    """The same file to the Arrow table of `datasets`, which checks, encodes and holds out nothing."""
    from datasets import load_dataset

    with tempfile.TemporaryDirectory() as cache:
        return len(load_dataset("csv", data_files=str(path), split="train", cache_dir=cache))


def test_reading_csv(race, smoke: bool, tmp_path: Path) -> None:
    rows = 1000 if smoke else 1_000_000
    path = tmp_path / "rows.csv"
    write_rows(path, rows)
    functions = {
        "minbert own task": lambda: read(path),
        "csv module": lambda: split_fields(path),
        "datasets": lambda: read_with_datasets(path),
    }
    assert {function() for function in functions.values()} == {rows}
    race(f"{rows} rows of CSV", functions)
