"""Bad input to any command: one clear line on stderr, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from groups import quick_options

from minbert import cli, evaluate, predict, train


def stderr_of_refused(command, arguments: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.run(command.main)
    assert stop.value.code == 2
    return capsys.readouterr().err


def check_training_is_refused(out: Path, options: list[str], parts: list[str], monkeypatch, capsys) -> None:
    """The error is one line with these parts, and there is no run directory."""
    error = stderr_of_refused(train, [f"--out={out}", *options], monkeypatch, capsys)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    assert not out.exists()


@pytest.mark.parametrize("command", [train, evaluate])
def test_a_path_that_the_system_refuses(command, monkeypatch, capsys):
    path = "x" * 300
    error = stderr_of_refused(command, [f"--out={path}"] if command is train else [path], monkeypatch, capsys)
    assert error.startswith(f"error: {path}")
    assert error.endswith(": File name too long\n")
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def run(course_data, tmp_path_factory) -> Path:
    """A run of one step."""
    path = tmp_path_factory.mktemp("messages") / "run"
    options = quick_options(course_data, path)
    assert train.main([*options, "--steps=1", "--batch-size=4"]) == 0
    return path


def damaged(course_data: Path, tmp_path: Path, name: str, text: str | None) -> Path:
    """The course data with one file replaced, or removed when `text` is None."""
    copy = tmp_path / "data"
    shutil.copytree(course_data, copy)
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text)
    return copy


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("quora-train.csv", None, ["quora-train.csv"]),
        ("ids-sst-train.csv", "", ["ids-sst-train.csv", "empty"]),
        ("ids-sst-train.csv", "\tid\tsentence\tsentiment\n", ["ids-sst-train.csv"]),
        ("ids-sst-train.csv", "\tid\ttext\tsentiment\n0\ta\tgood\t3\n", ["ids-sst-train.csv", "sentence", "text"]),
        ("ids-sst-train.csv", "\tid\tsentence\tsentiment\n0\ta\tgood\t7\n", ["ids-sst-train.csv"]),
        ("sts-dev.csv", "\tid\tsentence1\tsentence2\tsimilarity\n0\ta\tb\tc\thigh\n", ["sts-dev.csv"]),
    ],
)
def test_bad_data_files(course_data, tmp_path, monkeypatch, capsys, name, text, parts):
    data = damaged(course_data, tmp_path, name, text)
    options = [f"--data={data}", "--tasks=sst,qqp,sts", "--precision=fp32"]
    check_training_is_refused(tmp_path / "run", options, parts, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--data=/nowhere"], ["/nowhere"]),
        (["--tasks=sst,nli"], ["nli", "known"]),
        (["--model=/nowhere"], ["/nowhere"]),
        (["--model={tmp}"], ["vocab.txt"]),
        (["--config=/nowhere.yaml"], ["/nowhere.yaml"]),
        (["--batchsize=3"], ["--batchsize", "did you mean '--batch-size'"]),
        (["--max-length=1000"], ["--max-length 1000", "512"]),
        (["--device=gpu"], ["--device", "'gpu'", "cuda"]),
        (["--device=cuda:99"], ["cuda:99"]),
        (["--out={file}"], ["file"]),
        (["--tasks=sst2"], ["sst2"]),
        (["--scratch.hidden-size=30"], ["30", "4"]),
    ],
)
def test_bad_options(course_data, tmp_path, monkeypatch, capsys, options, parts):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    options = [option.format(tmp=tmp_path / "empty", file=tmp_path / "file" / "run") for option in options]
    defaults = [f"--data={course_data}", "--precision=fp32", "--steps=1"]
    given = {option.split("=")[0] for option in options}
    options += [option for option in defaults if option.split("=")[0] not in given]
    check_training_is_refused(tmp_path / "run", options, parts, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("command", "arguments", "parts"),
    [
        (evaluate, ["/nowhere"], ["/nowhere", "no such run"]),
        (evaluate, ["{tmp}"], ["config.yaml", "not a run directory"]),
        (evaluate, ["{run}", "--split=valid"], ["--split", "valid"]),
        (evaluate, ["{run}", "--tasks=cfimdb"], ["cfimdb", "sst, qqp, sts"]),
        (evaluate, ["{run}", "--split=test", "--tasks=sts"], ["test", "sts"]),
        (evaluate, [], ["run"]),
        (predict, ["{run}", "--task=sst", "--input=/nowhere"], ["/nowhere", "No such file"]),
        (predict, ["{run}", "--task=sts", "--input={empty}"], ["empty"]),
        (predict, ["{run}", "--task=sts", "--input={lines}"], ["line 1", "tab", "1 field"]),
        (predict, ["{run}", "--task=stt", "--input={lines}"], ["'stt'", "did you mean 'sts'"]),
        (predict, ["{run}", "--task=sst", "--input={lines}", "--output=/nowhere/x"], ["/nowhere/x"]),
        (predict, ["{run}", "--task=sst"], ["input"]),
    ],
)
def test_bad_requests_of_a_finished_run(run, tmp_path, monkeypatch, capsys, command, arguments, parts):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "lines.txt").write_text("one sentence\n")
    paths = {"tmp": tmp_path, "run": run, "empty": tmp_path / "empty.txt", "lines": tmp_path / "lines.txt"}
    error = stderr_of_refused(command, [argument.format(**paths) for argument in arguments], monkeypatch, capsys)
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
    for part in parts:
        assert part in error


def test_the_command_line_ends_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "minbert.train", "--epohcs=2", f"--out={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: unknown option --epohcs (did you mean '--epochs'?); --help-all lists the options\n"
    assert done.stdout == ""
