"""What is odd about a user's data is said when a run starts; what cannot be trained on is one line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from groups import quick_options

from minbert import cli, train

TASKS = """\
tasks:
  tags: {text: message, label: tags, type: multilabel, train: train.csv, dev: dev.csv}
"""
TRAIN = 'message,tags\na,x|y\n"b\nb",x\n,x\nc,y\nd,\n'


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    (tmp_path / "tasks.yaml").write_text(TASKS)
    (tmp_path / "train.csv").write_text(TRAIN)
    quick = [option for option in quick_options(tmp_path, tmp_path / "run") if not option.startswith("--data=")]
    return [*quick, f"--tasks-file={tmp_path}/tasks.yaml", "--steps=1", "--batch-size=2"]


def test_warnings_and_skipped_rows_are_said_at_the_start(options, tmp_path, capsys):
    (tmp_path / "dev.csv").write_text("message,tags\nc,x\nnew,y\n")
    assert train.main(options) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "train.csv: the separator ';' is in no label of column 'tags'",
        'did you mean `separator: "|"`?',
        "dev.csv: texts of 1 of the 2 dev examples are also trained on, the first on line 2",
        "line 5, id 2: empty text",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("dev", "parts"),
    [
        ("message,tags\nc,z\n", ["dev.csv, line 2: label 'z' is none of the classes 'x', 'x|y', 'y'"]),
        ("message,tags\n", ["dev.csv has no rows"]),
        (
            "massage,tags\nc,x\n",
            ["dev.csv, line 1: no column 'message' (did you mean 'massage'?); found massage, tags"],
        ),
        (None, ["task tags: dev:", "dev.csv cannot be read (No such file or directory)"]),
    ],
)
def test_bad_data_is_one_line(options, tmp_path, monkeypatch, capsys, dev, parts):
    if dev is not None:
        (tmp_path / "dev.csv").write_text(dev)
    monkeypatch.setattr(sys, "argv", ["train", *options])
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main)
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert all(part in error for part in parts)
    assert not (tmp_path / "run").exists()
