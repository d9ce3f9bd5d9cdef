"""Reviews with stars: a fair draw of as many for each number of stars, and clear words about any other file."""

from __future__ import annotations

import collections
import csv
import json
from pathlib import Path

import pytest

from minbert.data import WithReviews, open_source
from minbert.data.star_reviews import read_reviews
from minbert.errors import UserError
from minbert.tasks import TASKS

REVIEWS = [{"review_id": f"r{i}", "stars": 1.0 + i % 5, "text": f"review\nnumber {i}"} for i in range(100)]


def json_lines(path: Path, reviews: list[dict]) -> Path:
    path.write_text("".join(json.dumps(review) + "\n" for review in reviews), encoding="utf-8")
    return path


def csv_file(path: Path, reviews: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(reviews[0]))
        writer.writeheader()
        writer.writerows(reviews)
    return path


def test_each_number_of_stars_is_drawn_alike_and_labels_start_at_0(tmp_path):
    drawn = read_reviews(json_lines(tmp_path / "reviews.json", REVIEWS), 7, seed=0)
    assert collections.Counter(drawn.labels.tolist()) == dict.fromkeys(range(5), 7)
    for text, label, line in zip(drawn.texts, drawn.labels, drawn.ids, strict=True):
        assert (int(text.split()[-1]) % 5, int(text.split()[-1]) + 1) == (label, int(line))
    assert drawn.ids == sorted(drawn.ids, key=int)


def test_json_lines_and_csv_give_the_same_draw(tmp_path):
    one = read_reviews(json_lines(tmp_path / "reviews.json", REVIEWS), 7, seed=3)
    other = read_reviews(csv_file(tmp_path / "reviews.csv", REVIEWS), 7, seed=3)
    assert one.texts == other.texts
    assert one.labels.tolist() == other.labels.tolist()


def test_an_empty_text_is_named_and_a_text_may_be_long(tmp_path):
    long = "x" * 200_000
    for path in (
        json_lines(tmp_path / "reviews.json", [*REVIEWS, {"stars": 1, "text": " "}, {"stars": 1, "text": long}]),
        csv_file(
            tmp_path / "reviews.csv", [{"stars": 5, "text": ""}, *({"stars": i, "text": long} for i in range(1, 6))]
        ),
    ):
        drawn = read_reviews(path, 1, seed=0)
        assert [(row.file, row.reason) for row in drawn.skipped] == [(str(path), "empty text")]
        assert drawn.skipped[0].line == (101 if path.suffix == ".json" else 2)


def test_the_draw_follows_the_seed_and_every_review_has_the_same_chance(tmp_path):
    path = json_lines(tmp_path / "reviews.json", REVIEWS)
    assert read_reviews(path, 5, 1).texts == read_reviews(path, 5, 1).texts != read_reviews(path, 5, 2).texts
    counts = collections.Counter(text for seed in range(200) for text in read_reviews(path, 5, seed).texts)
    assert len(counts) == 100
    assert max(abs(count - 50) for count in counts.values()) < 6 * (200 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"stars": 5, "text": "x"}\n{"stars": 5, "te', r"line 2: not JSON: .*is the file cut short"),
        ('{"stars": 5}\n', "line 1: expected a review with stars and text; found stars"),
        ('{"stars": 4.5, "text": "x"}\n', "line 1: expected 1, 2, 3, 4 or 5 stars, got '4.5'"),
        ('{"stars": null, "text": "x"}\n', "line 1: expected 1, 2, 3, 4 or 5 stars, got 'None'"),
        ('{"stars": 1, "text": "x"}\n[]\n', "line 2: expected a JSON object with stars and text, got a list"),
        ("5,good\n", "line 1: expected a JSON object, or a CSV header with stars and text; found 5, good"),
        ("", "found nothing"),
        ("stars,text,text\n5,a,b\n", "line 1: the header has the column 'text' twice; expected one"),
        (
            "stars,text\n1,bad, very bad\n",
            "line 2: expected a review .* in 2 fields, found 3; a text with commas needs",
        ),
        ('stars,text\n\n5,"good\nfilm"\n4,nice,or not\n', "line 5: expected a review .* in 2 fields, found 3"),
        ('stars,text\n5,"good" film\n', "line 2: cannot split its fields .text after a closing quote"),
        ('stars,text\n5,good\n4,"bad\n3,more\n', "line 3: cannot split its fields .a quote is not closed"),
        ('{"stars": 1, "text": "x"}\n' + "[" * 9999 + "\n", r"line 2: not JSON: nested too deeply"),
        ('{"stars": 1, "text": "\\ud800"}\n', "line 1: not Unicode text"),
        ('{"stars": 1, "stars": 2, "text": "x"}\n', "line 1: not JSON: key 'stars' twice in an object"),
        ("stars,text\r1,x\r", "its lines end with carriage returns alone"),
        ('stars,text\n5,good\nsix,"good\nfilm"\n', "line 4: expected 1, 2, 3, 4 or 5 stars, got 'six'"),
        ('stars,text\n5,"good\n', "cannot split its fields"),
        ("stars,text\n5\n", "line 2: expected a review with stars and text"),
        ("stars,text\n5,good\n", "0 reviews with 1 stars, expected 2; give --reviews-per-star 1, or a file with more"),
    ],
)
def test_a_file_of_something_else_is_refused_by_its_line(tmp_path, content, message):
    path = tmp_path / "reviews"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_reviews(path, 2, seed=0)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--reviews .*absent: cannot be read \(No such file"):
        read_reviews(tmp_path / "absent", 2, seed=0)
    (tmp_path / "latin").write_bytes('{"stars": 1, "text": "x"}\n{"stars": 1, "text": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="latin, line 2: not UTF-8"):
        read_reviews(tmp_path / "latin", 2, seed=0)


def test_reviews_are_the_train_split_of_one_more_task(tmp_path, course_data):
    path = json_lines(tmp_path / "reviews.json", REVIEWS)
    source = WithReviews(open_source(str(course_data)), str(path), 4, seed=0)
    assert source.name == f"{course_data} and {path}"
    assert source.tasks() == ["sst", "qqp", "sts", "yelp"]
    assert source.splits(TASKS["yelp"]) == ["train"]
    assert source.splits(TASKS["sts"]) == ["train", "dev"]
    assert len(source.load(TASKS["yelp"], "train")) == 20
    assert len(source.load(TASKS["sst"], "train")) == 48
