"""`minbert tasks FILE`: what it says of a tasks file, its labels, its texts in tokens, and what is odd."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from minbert.data import Examples
from minbert.data.tokenizer import Tokenizer
from minbert.describe_tasks import count_tokens, hints, main, row_lines
from minbert.errors import UserError
from minbert.tasks import Task

MODEL = Path(__file__).parent / "fixtures" / "run-0.1.0" / "run" / "best"


def write_tasks(directory: Path, **records: dict) -> str:
    path = directory / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": records}, sort_keys=False), encoding="utf-8")
    return str(path)


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


TOPICS = ("billing", "bug", "other")


@pytest.fixture
def tickets(tmp_path):
    """Records of the three types: 60 tickets with topics, tags and stars, and five more for dev."""
    rows = [
        [f"t{n}", f"ticket {n} about {TOPICS[n % 3]}", TOPICS[n % 3], ";".join(["red", "blue"][: n % 3]), n % 5 + 1]
        for n in range(65)
    ]
    header = ["id", "the message", "topic", "tags", "stars"]
    write_csv(tmp_path / "train.csv", header, rows[:60])
    write_csv(tmp_path / "dev.csv", header, rows[60:])
    files = {"train": "train.csv", "dev": "dev.csv"}
    return write_tasks(
        tmp_path,
        topic={
            "text": "the message",
            "label": "topic",
            "type": "classification",
            "metrics": ["f1", "accuracy"],
            **files,
        },
        tags={"text": "the message", "label": "tags", "type": "multilabel", **files},
        stars={"text": ["topic", "the message"], "label": "stars", "type": "regression", "scale": [1, 5], **files},
    )


def described(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def cells(text: str) -> list[list[str]]:
    """The words of every line."""
    return [line.split() for line in text.splitlines()]


def test_each_record_is_described(tickets, capsys):
    text = described(capsys, tickets)
    sections = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections] == [
        "topic: classification, from a text to classes",
        "tags: multilabel, from a text to any number of labels",
        "stars: regression, from a pair of texts to scores",
    ]
    directory = Path(tickets).parent
    for line in (
        "  text           'the message'",
        "  label          'topic'",
        f"  train          {directory}/train.csv: 60 examples",
        f"  dev            {directory}/dev.csv: 5 examples",
        "  classes        3, of the training file",
        "  metrics        f1 (decides which epoch is best), accuracy",
        "  head           linear",
        "  loss           cross_entropy",
    ):
        assert line in sections[0].splitlines()
    assert "  separator      ';'" in sections[1].splitlines()
    assert "  scale          1 to 5; inside minbert it is 0 to 5" in sections[2].splitlines()
    assert "  text           'topic', 'the message'" in sections[2].splitlines()


def test_classes_are_counted_by_split(tickets, capsys):
    found = cells(described(capsys, tickets, "--tasks=topic"))
    assert ["0", "'billing'", "20", "2", "33.3%"] in found
    assert ["1", "'bug'", "20", "2", "33.3%"] in found
    assert ["2", "'other'", "20", "1", "33.3%"] in found
    found = cells(described(capsys, tickets, "--tasks=tags"))
    assert ["0", "'blue'", "20", "1", "33.3%"] in found
    assert ["1", "'red'", "40", "3", "66.7%"] in found
    assert ["no", "label", "20", "2", "33.3%"] in found


def test_f1_of_two_classes_names_the_second(tickets, tmp_path, capsys):
    assert "metrics        f1 (decides" in described(capsys, tickets, "--tasks=topic")
    write_csv(tmp_path / "two.csv", ["text", "label"], [[f"text {n}", "ny"[n % 2]] for n in range(8)])
    record = {"text": "text", "label": "label", "type": "classification", "train": "two.csv", "dev": 0.5}
    text = described(capsys, write_tasks(tmp_path, own=record | {"metrics": ["accuracy", "f1"]}))
    assert "metrics        accuracy (decides which epoch is best), f1 of 'y'" in text


def test_scores_are_on_the_users_scale(tickets, capsys):
    found = cells(described(capsys, tickets, "--tasks=stars"))
    assert ["train", "1", "2", "3", "4", "5", "3"] in found
    assert ["dev", "1", "2", "3", "4", "5", "3"] in found


def test_rows_are_shown_as_the_model_reads_them(tickets, capsys):
    rows = described(capsys, tickets, "--tasks=topic", f"--model={MODEL}").partition("5 rows of train")[2]
    tokenizer = Tokenizer.from_pretrained(MODEL)
    lines = rows.splitlines()[1:11]
    assert [line.strip() for line in lines[::2]] == [
        f"id t{n}, label '{TOPICS[n % 3]}', inside minbert {n % 3}" for n in (0, 15, 30, 44, 59)
    ]
    shown = [line.strip() for line in lines[1::2]]
    assert shown == [
        tokenizer.decode(tokenizer.encode(f"ticket {n} about {TOPICS[n % 3]}")) for n in (0, 15, 30, 44, 59)
    ]
    assert all(line.startswith("[CLS] ") and line.endswith(" [SEP]") for line in shown)
    rows = described(capsys, tickets, "--tasks=stars", f"--model={MODEL}").partition("5 rows of train")[2]
    assert "id t59, label 5, inside minbert 5" in rows
    assert "id t15, label 1, inside minbert 0" in rows
    assert all(line.count("[SEP]") == 2 for line in rows.splitlines()[2:11:2])
    rows = described(capsys, tickets, "--tasks=tags", f"--model={MODEL}").partition("5 rows of train")[2]
    assert "id t0, label none, inside minbert 0 everywhere" in rows
    assert "id t59, label 'blue', 'red', inside minbert 1 at 0, 1" in rows


def task_of(**options: object) -> Task:
    return Task("own", **{"text": ("a", "b"), "label": "label", "classes": ("x", "y"), **options})


def pairs(count: int, labels: list[int]) -> Examples:
    first = ["one two three"] * count
    return Examples(list(map(str, range(count))), first, ["four five"] * count, np.array(labels, np.float32))


@pytest.mark.parametrize(
    ("head", "texts"),
    [
        ("linear", ["[CLS] one two three [SEP] four five [SEP]"]),
        ("difference", ["[CLS] one two three [SEP]", "[CLS] four five [SEP]"]),
        (
            "layers-cosine",
            ["[CLS] one two three [SEP] four five [SEP]", "[CLS] one two three [SEP]", "[CLS] four five [SEP]"],
        ),
    ],
)
def test_the_sequences_are_those_of_the_head(head, texts):
    task, examples = task_of(head=head), pairs(2, [0, 1])
    counts = count_tokens(task, {"train": examples}, None)
    assert "an estimate: tokens by a tokenizer that was trained on 2 examples of train" in counts.how
    first, *sequences = list(row_lines(task, examples, counts.tokenizer, 512))[: len(texts) + 1]
    assert first == "id 0, label 'x', inside minbert 0"
    assert [line.strip() for line in sequences] == texts
    of_each = [len(text.split()) for text in texts]
    assert sorted(counts.lengths["train"].tolist()) == sorted(2 * of_each)


def test_long_texts_are_cut_to_max_length_and_counted(tmp_path, capsys):
    rows = [[" ".join(["word"] * (n + 1)), "yes" if n % 2 else "no"] for n in range(20)]
    write_csv(tmp_path / "train.csv", ["text", "label"], rows)
    record = {"text": "text", "label": "label", "type": "classification", "train": "train.csv", "dev": 0.2}
    text = described(capsys, write_tasks(tmp_path, words=record), "--max-length=12")
    lengths = re.search(r"^ +train +(\d+) +\d+ +\d+ +\d+ +(\d+) +(\d+)", text, re.MULTILINE)
    train, dev = (int(re.search(rf"{split} .*: (\d+) example", text)[1]) for split in ("train", "dev"))
    assert train + dev == 20
    assert int(lengths[1]) == train
    cut = re.findall(r"^  (?:train|dev)(?: +\d+){5} +(\d+) *$", text, re.MULTILINE)
    assert sum(map(int, cut)) == 10  # those of 13 to 22 tokens
    assert "are cut to 12 tokens" in text
    longest = max(len(line.split()) for line in text.splitlines() if "[CLS]" in line)
    assert longest == 12


def test_skipped_rows_and_warnings_are_shown(tmp_path, capsys):
    rows = [[f"text {n}", ["yes", "no"][n % 2]] for n in range(12)]
    write_csv(tmp_path / "train.csv", ["text", "label"], [*rows, ["", "yes"], ["last", ""]])
    record = {"text": "text", "label": "label", "type": "classification", "train": "train.csv", "dev": 0.25}
    record["classes"] = ["yes", "no", "perhaps"]
    text = described(capsys, write_tasks(tmp_path, own=record))
    assert re.search(r"train +\S+/train\.csv: \d+ examples, 2 rows left out", text)
    assert f"warning: 2 rows of {tmp_path}/train.csv left out:" in text
    assert "line 14, id 12: empty text" in text
    assert re.search("warning: .*no example of the class 'perhaps' in the training data", text)
    assert "classes        3, of the record" in text


def test_hints():
    few = pairs(44, [0] * 42 + [1] * 2)
    counts = count_tokens(task_of(), {"train": few, "dev": pairs(1, [0])}, None)
    splits = {"train": few, "dev": pairs(1, [0]), "test": pairs(2, [0, 1])}
    found = hints(task_of(), splits, counts, 512)
    assert found[0] == "1 of 2 classes have fewer than 5 training examples"
    assert found[1].startswith("class 'x' has 21 times as many training examples as 'y': `class_weights: balanced`")
    assert found[2] == "dev has 1 example: a score of so few is a rough one"
    assert found[3].startswith("test: 2 examples with texts that are in train too")
    assert len(found) == 4
    weighted = hints(task_of(class_weights="balanced"), {"train": few}, counts, 512)
    assert weighted == found[:1]
    assert "train: 100.0% of the sequences are cut to 4 tokens" in hints(task_of(), splits, counts, 4)
    balanced = pairs(10, [0, 1] * 5)
    assert hints(task_of(), {"train": balanced}, count_tokens(task_of(), {"train": balanced}, None), 512) == []


def test_many_classes_are_counted_together_after_the_commonest(tmp_path, capsys):
    labels = [f"class {n}" for n in range(60) for _ in range(2 + (n == 59))]
    rows = [[f"text {n}", label] for n, label in enumerate(labels)]
    write_csv(tmp_path / "train.csv", ["text", "class"], rows)
    record = {"text": "text", "label": "class", "type": "classification", "train": "train.csv", "dev": "train.csv"}
    text = described(capsys, write_tasks(tmp_path, own=record))
    assert ["20", "more,", "of", "at", "most", "2", "in", "train", "40", "40"] in cells(text)
    listed = re.findall(r"^ +\d+ +'class (\d+)' ", text, re.MULTILINE)
    assert (len(listed), listed[0]) == (40, "59")


def test_any_text_is_escaped(tmp_path, capsys):
    red = "\x1b[31mred\x1b[0m [bold]b[/bold]"
    rows = [[f"{red} {n}\nmore", red if n % 2 else "plain", f"i{n}\x07"] for n in range(10)]
    write_csv(tmp_path / "train.csv", [red, "label", "id"], rows)
    record = {"text": red, "label": "label", "type": "classification", "train": "train.csv", "dev": "train.csv"}
    text = described(capsys, write_tasks(tmp_path, own=record))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"id i0\x07, label 'plain', inside minbert 1" in text
    assert r"text           '\x1b[31mred\x1b[0m [bold]b[/bold]'" in text
    assert "[bold]b[/bold]" in text


def test_bad_input_is_one_line(tickets, tmp_path):
    for arguments, message in (
        ([tickets, "--tasks=topics"], r"unknown task 'topics' \(did you mean 'topic'\?\); known: topic, tags, stars"),
        ([tickets, "--max-length=3"], "--max-length must be at least 4, got 3"),
        ([str(tmp_path / "absent.yaml")], r"absent\.yaml: cannot be read \(No such file or directory\)"),
        ([], "FILE is missing"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
    files = {"train": str(tmp_path / "train.csv"), "dev": 0.5}
    single = {"text": "the message", "label": "topic", "type": "classification", "head": "cosine", **files}
    with pytest.raises(UserError, match="task own: head cosine: reads pairs of sentences, and own has single ones"):
        main([write_tasks(tmp_path, own=single)])
    with pytest.raises(UserError, match="task own: loss: unknown loss 'cross'; known: cross_entropy, "):
        main([write_tasks(tmp_path, own={**single, "head": "linear", "loss": "cross"})])
    (tmp_path / "dev.csv").unlink()
    files["dev"] = "dev.csv"
    with pytest.raises(UserError, match=r"task own: dev: .*dev\.csv cannot be read"):
        main([write_tasks(tmp_path, own={**single, "head": "linear", **files})])


def test_the_command_runs(tickets, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "minbert.tasks", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = run(tickets, "--tasks=stars")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("stars: regression, from a pair of texts to scores\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"message": "hello", "topic": "a"}) + "\n")
    record = {"text": "mesage", "label": "topic", "type": "classification", "train": "bad.jsonl", "dev": 0.5}
    done = run(write_tasks(tmp_path, own=record))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*bad\.jsonl.*'mesage'.*\n", done.stderr)
