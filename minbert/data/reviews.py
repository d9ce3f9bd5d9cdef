"""Reviews with 1 to 5 stars, such as Yelp's, as the training data of an auxiliary task (paper 001, section 4.4)."""

from __future__ import annotations

import csv
import heapq
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minbert.data.formats import Examples
from minbert.errors import UserError
from minbert.seeds import derive_seed

STARS = (1, 2, 3, 4, 5)


def read_reviews(path: str | Path, per_star: int, seed: int) -> Examples:
    """Draw as many reviews of each number of stars, every one with the same chance.

    The file is read once, and only what may be drawn is kept: it may be larger than memory.

    Args:
        path: JSON objects on lines, or CSV with a header; both with `stars` and `text`. Empty texts are left out.
        per_star: reviews for each number of stars.
        seed: what the draw follows.

    Returns:
        the reviews in the file's order, labels 0 to 4 for 1 to 5 stars, ids their lines.

    Raises:
        UserError: the file cannot be read, a line of it is not a review, or it has too few with some number of stars.
    """
    words = np.random.PCG64(derive_seed(seed, "reviews"))
    drawn: dict[int, list[tuple[int, int, str]]] = {stars: [] for stars in STARS}  # heaps: the largest word goes first
    for line, review in _records(Path(path)):
        text = review.get("text")
        if not isinstance(text, str):
            raise UserError(f"{path}, line {line}: expected a review with stars and text; found {_names(review)}")
        if not text.strip():
            continue
        chosen = drawn[_stars(review.get("stars"), f"{path}, line {line}")]
        entry = (-int(words.random_raw()), line, text.strip())
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
    return Examples([str(line) for line, _, _ in rows], [text for _, _, text in rows], None, labels)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines (from 1) and what they hold by name."""
    lines = _lines(path)
    first = next(lines, "")
    if first.lstrip().startswith("{"):
        for number, line in enumerate(itertools.chain([first], lines), 1):
            if line.strip():
                yield number, _json_object(line, f"{path}, line {number}")
        return
    reader = csv.DictReader(itertools.chain([first], lines), strict=True)
    if not {"stars", "text"} <= set(reader.fieldnames or ()):
        found = ", ".join(reader.fieldnames or ()) or "nothing"
        raise UserError(
            f"{path}, line 1: expected a JSON object, or a CSV header with stars and text; found {found[:80]}"
        )
    try:
        for record in reader:
            yield reader.line_num, record
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: cannot tell its fields apart ({error})") from None


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise UserError(f"--reviews {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number}: not UTF-8 text; convert the file to UTF-8") from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); is the file cut short?") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with stars and text, got a {type(record).__name__}")
    return record


def _stars(value: object, where: str) -> int:
    try:
        stars = float(str(value))
    except ValueError:
        stars = 0.0
    if stars not in STARS:
        raise UserError(f"{where}: expected 1, 2, 3, 4 or 5 stars, got {str(value)[:40]!r}")
    return int(stars)


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(str, record))[:80] or "nothing"
