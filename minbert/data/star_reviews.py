"""Reviews with 1 to 5 stars, such as Yelp's: training data of an auxiliary task (paper 001, section 4.4)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minbert.data.examples import Examples
from minbert.data.line_reader import read_lines, shorten, split_quoted
from minbert.data.skipped import Skipped
from minbert.errors import UserError, one_line
from minbert.files.json_yaml import is_unicode, parse_object
from minbert.seeds import derive_seed

STARS = (1, 2, 3, 4, 5)


def read_reviews(path: str | Path, per_star: int, seed: int) -> Examples:
    """Draw the same number of reviews for each number of stars, each review with the same probability.

    The file is read once, by reservoir sampling: it may be larger than memory.

    Args:
        path: JSON objects on lines, or CSV with a header; both with `stars` and `text`. Empty texts are
            skipped.
        per_star: reviews for each number of stars.
        seed: of the draw.

    Returns:
        The reviews in the file's order; their labels are 0 to 4 for 1 to 5 stars, their ids are their lines.

    Raises:
        UserError: the file cannot be read, a line of it is not a review, or it has too few with some number of stars.
    """
    generator = np.random.PCG64(derive_seed(seed, "reviews"))
    skipped: list[Skipped] = []
    # Heaps: the largest random number is dropped first.
    drawn: dict[int, list[tuple[int, int, str]]] = {stars: [] for stars in STARS}
    for line, review in _records(Path(path)):
        where, text = f"{path}, line {line}", review.get("text")
        if not isinstance(text, str):
            raise UserError(f"{where}: expected a review with stars and text; found {_names(review)}")
        if not is_unicode(text):
            raise UserError(f"{where}: not Unicode text (half a surrogate pair); write the file again")
        if not text.strip():
            skipped.append(Skipped(str(path), line, "empty text", str(line)))
            continue
        chosen = drawn[_stars(review.get("stars"), where)]
        entry = (-int(generator.random_raw()), line, text.strip())
        if len(chosen) < per_star:
            heapq.heappush(chosen, entry)
        else:
            heapq.heappushpop(chosen, entry)
    for stars, chosen in drawn.items():
        if len(chosen) < per_star:
            raise UserError(
                f"{path}: {len(chosen)} reviews with {stars} stars, expected {per_star};"
                f" give --reviews-per-star {min(map(len, drawn.values())) or 1}, or a file with more"
            )
    rows = sorted((line, stars, text) for stars, chosen in drawn.items() for _, line, text in chosen)
    labels = np.array([stars - 1 for _, stars, _ in rows], np.float32)
    return Examples([str(line) for line, _, _ in rows], [text for _, _, text in rows], None, labels, skipped)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each review's line (from 1; its last one if it spans several) and its values by name."""
    lines = _NumberedLines(read_lines(path, "reviews with stars and text", option="--reviews"))
    first = next(lines, "")
    if first.lstrip().startswith("{"):
        for line in itertools.chain([first], lines):
            if line.strip():
                try:
                    yield lines.number, parse_object(line, "a JSON object with stars and text", strict=False)
                except ValueError as error:
                    remedy = "; is the file cut short?" if str(error).startswith("not JSON") else ""
                    raise UserError(f"{path}, line {lines.number}: {one_line(str(error))}{remedy}") from None
        return
    names = [name.strip() for name in _fields(path, first, lines)]
    if not {"stars", "text"} <= set(names):
        found = one_line(shorten(", ".join(filter(None, names)) or "nothing", 80))
        raise UserError(f"{path}, line 1: expected a JSON object, or a CSV header with stars and text; found {found}")
    for name in ("stars", "text"):
        if names.count(name) > 1:
            raise UserError(f"{path}, line 1: the header has the column {name!r} twice; expected one")
    for line in lines:
        if not line.strip():
            continue
        fields = _fields(path, line, lines)
        if len(fields) != len(names):
            raise UserError(
                f"{path}, line {lines.number}: expected a review with stars and text in {len(names)} fields, found"
                f" {len(fields)}; a text with commas needs quotes"
            )
        yield lines.number, dict(zip(names, fields, strict=True))


def _fields(path: Path, line: str, lines: _NumberedLines) -> list[str]:
    number = lines.number
    fields, problem = split_quoted(line, ",", lines)
    if problem:
        raise UserError(f"{path}, line {number}: {problem}")
    return fields


class _NumberedLines(Iterator[str]):
    """Lines, and the number of the last one read, from 1."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines, self.number = lines, 0

    def __next__(self) -> str:
        line = next(self.lines)
        self.number += 1
        return line


def _stars(value: object, where: str) -> int:
    try:
        stars = float(str(value).replace("_", "?"))
    except ValueError:
        stars = 0.0
    if stars not in STARS:
        raise UserError(f"{where}: expected 1, 2, 3, 4 or 5 stars, got {shorten(str(value))!r}")
    return int(stars)


def _names(record: dict[str, Any]) -> str:
    return one_line(shorten(", ".join(map(str, record)), 80)) or "nothing"
