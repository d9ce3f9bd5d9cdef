"""Small data in the course's format, learnable from single words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

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


def write_further_data(directory: Path) -> dict[str, Path]:
    """Reviews with stars, and a further example of sst: the files that some rows of the papers need, by option."""
    files = {name: directory / name for name in ("reviews", "augmented")}
    reviews = ({"stars": 1 + i % 5, "text": f"review {i}"} for i in range(2500))
    files["reviews"].write_text("".join(json.dumps(review) + "\n" for review in reviews))
    files["augmented"].write_text("id\tsentence\tsentiment\na1\tthe film was fine .\t3\n")
    return files
