"""Small data in the course's format, and the options of a run that takes a second."""

from __future__ import annotations

import os

# Small work on few threads that sleep when idle: quick even when something else keeps the cores busy.
os.environ.update(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")

from pathlib import Path

import numpy as np
import pytest

WORDS = {
    0: ["awful", "dull", "boring"],
    1: ["poor", "weak", "thin"],
    2: ["plain", "usual", "average"],
    3: ["good", "nice", "solid"],
    4: ["great", "superb", "perfect"],
}
NOUNS = ["film", "meal", "book", "song", "hotel", "garden", "train", "game"]


def course_file(path: Path, columns: list[str], rows: list[list[object]]) -> None:
    """Write rows under an unnamed index column, tab-separated, as the course does."""
    lines = ["\t".join(["", *columns])]
    lines += ["\t".join([str(i), *map(str, row)]) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_course_data(directory: Path, train: int = 48, dev: int = 24) -> Path:
    """A directory of CS224N files for sst, qqp and sts (with a test split of sst), learnable from single words."""
    rng = np.random.default_rng(0)
    for split, rows in (("train", train), ("dev", dev)):
        sst, quora, sts = [], [], []
        for i in range(rows):
            label = i % 5
            noun, other = rng.choice(NOUNS, 2, replace=False)
            word = rng.choice(WORDS[label])
            second = noun if i % 2 else other
            sst.append([f"s{split}{i}", f"the {noun} was {word} .", label])
            quora.append([f"q{split}{i}", f"is the {noun} good ?", f"is the {second} nice ?", f"{i % 2}.0"])
            sts.append([f"t{split}{i}", f"a {noun} here", f"a {second} there", (i % 2) * 4 + 0.5])
        course_file(directory / f"ids-sst-{split}.csv", ["id", "sentence", "sentiment"], sst)
        course_file(directory / f"quora-{split}.csv", ["id", "sentence1", "sentence2", "is_duplicate"], quora)
        course_file(directory / f"sts-{split}.csv", ["id", "sentence1", "sentence2", "similarity"], sts)
    test = "\n".join(f"{i}\t{i}.0\tx{i}\tthe {noun} was good ." for i, noun in enumerate(NOUNS))
    (directory / "ids-sst-test-student.csv").write_text(f"0\t\tid\tsentence\n{test}\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests' encoded texts out of the user's cache."""
    os.environ["MINBERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def course_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_course_data(tmp_path_factory.mktemp("course"))


@pytest.fixture
def quick(course_data: Path, tmp_path: Path) -> list[str]:
    """Options of a run of twelve steps in two epochs with a very small encoder, in `tmp_path / "run"`."""
    options = {
        "data": course_data,
        "out": tmp_path / "run",
        "batch-size": 8,
        "epochs": 2,
        "checkpoint-steps": 4,
        "log-steps": 1,
        "scratch.hidden-size": 16,
        "scratch.num-attention-heads": 2,
        "scratch.intermediate-size": 32,
        "scratch.num-hidden-layers": 1,
    }
    return [f"--{name}={value}" for name, value in options.items()]
