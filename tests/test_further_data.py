"""Runs on more than the training files hold: swapped pairs, augmented sentences, reviews."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minbert import evaluate, train
from minbert.data import read_examples
from minbert.errors import UserError
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS

PLAIN = ["--surgery=sum", "--smart.lambda-s=0"]


def test_swapping_doubles_the_pairs_and_the_batch_and_leaves_the_epoch(quick, tmp_path, capsys):
    assert train.main([*quick, *PLAIN, "--swap-pairs=sts"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "STS-B" in line)
    assert line.split()[2:4] == ["96", "24"]
    run = Run(tmp_path / "run").summary()
    assert (run["steps"], run["examples"]) == (12, 12 * (8 + 8 + 16))


def test_augmented_sentences_join_the_training_split_alone(quick, tmp_path, course_data, capsys):
    originals = read_examples(course_data / "ids-sst-train.csv", TASKS["sst"])
    rows = [{"id": i, "sentence": f"so {text}"} for i, text in zip(originals.ids, originals.texts, strict=True)]
    rows[3]["sentence"] = originals.texts[3]
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.main([*quick, *PLAIN, "--steps=2", f"--augmented.sst={file}"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "SST-5" in line)
    assert line.split()[2:5] == ["95", "24", "1"]

    dev = read_examples(course_data / "ids-sst-dev.csv", TASKS["sst"])
    file.write_text(json.dumps({"id": dev.ids[0], "sentence": "leaked", "sentiment": 1}) + "\n")
    with pytest.raises(UserError, match=r"more\.jsonl, line 1: .* is an example of the dev split"):
        train.main([*quick, f"--augmented.sst={file}", f"--out={tmp_path / 'other'}"])
    file.write_text(json.dumps({"sentence": "another", "sentiment": 1}) + "\n")
    with pytest.raises(UserError, match="the training data of sst changed"):
        train.main([*quick, *PLAIN, "--steps=2", f"--augmented.sst={file}", "--resume"])


@pytest.fixture
def reviews(tmp_path) -> Path:
    path = tmp_path / "reviews.json"
    rows = [{"stars": 1 + i % 5, "text": f"visit {i} was {'good' if i % 5 > 2 else 'bad'}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "options",
    [
        ["--surgery=pcgrad"],
        ["--surgery-groups=sst+yelp,qqp,sts"],
        ["--surgery-groups=sst+qqp+sts,yelp", "--low-memory"],
        ["--surgery=gse", "--accumulate=2", "--batch-size=4", "--bregman.mu=0.5"],
        ["--surgery=sum", "--sampling=round-robin"],
    ],
    ids=lambda options: " ".join(options),
)
def test_reviews_are_trained_on_and_never_evaluated(quick, tmp_path, reviews, options):
    options = [*quick, f"--reviews={reviews}", "--reviews-per-star=10", "--steps=4", *options]
    assert train.main(options) == 0
    records = Run(tmp_path / "run").metrics.records()
    assert any("yelp" in record.get("loss", {}) for record in records)
    assert list(Run(tmp_path / "run").summary()["dev"]) == ["sst", "qqp", "sts", "overall"]
    assert not list((tmp_path / "run" / "predictions").glob("yelp*"))
    assert evaluate.main([str(tmp_path / "run")]) == 0
    assert train.main([*options, "--resume"]) == 0


def test_an_auxiliary_task_can_share_a_row_of_surgery(quick, tmp_path, reviews):
    """As in paper 001, section 5.5: surgery sees the sum of its gradient and the others' of its group."""
    options = [f"--reviews={reviews}", "--reviews-per-star=10", "--steps=1", "--surgery-groups=sst+qqp+sts,yelp"]
    assert train.main([*quick, *options]) == 0
    (record,) = (record for record in Run(tmp_path / "run").metrics.records() if "loss" in record)
    assert list(record["cosine"]) == ["sst+qqp+sts/yelp"]
    assert list(record["loss"]) == ["sst", "qqp", "sts", "yelp"]
