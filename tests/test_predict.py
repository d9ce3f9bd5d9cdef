"""predict reads its input as a stream: results come with the rows, memory is that of a window, nothing else is read."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest

from minbert import evaluate, predict, predictor, train
from minbert.data import formats, read_windows
from minbert.errors import UserError
from minbert.files.atomic import MANIFEST
from minbert.tasks import TASKS

SST = TASKS["sst"]
PATIENCE = 60.0  # seconds until a test gives up to wait for a result


@pytest.fixture(scope="module")
def run(course_data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "run"
    options = ["--precision=fp32", "--steps=2", "--batch-size=4", "--scratch.hidden-size=32", "--tasks=sst"]
    assert train.main([f"--data={course_data}", f"--out={path}", *options, "--scratch.num-hidden-layers=1"]) == 0
    return path


def lines_of(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_results_come_before_the_input_ends(run, monkeypatch):
    """The second sentence is written when the result of the first is there."""
    read, write = os.pipe()
    came, in_time = threading.Event(), []

    class Output(io.StringIO):
        def flush(self) -> None:
            came.set()

    def feed() -> None:
        with os.fdopen(write, "w") as pipe:
            pipe.write("a fine film\n")
            pipe.flush()
            in_time.append(came.wait(PATIENCE))
            pipe.write("a bad")
            pipe.flush()
            pipe.write(" film\nand one more")

    output = Output()
    feeder = threading.Thread(target=feed)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", output)
        feeder.start()
        assert predict.main([str(run), "--task=sst", "--input=-"]) == 0
    feeder.join()
    assert in_time == [True]
    assert [line.split(" , ")[0] for line in output.getvalue().splitlines()[1:]] == ["0", "1", "2"]


def test_windows_give_what_the_whole_input_gives(run, tmp_path, monkeypatch, capsys):
    words = ("good", "", "a very long sentence about a film", "bad", "", "", "so so", "the end")
    path = lines_of(tmp_path / "texts", *words)
    options = [str(run), "--task=sst", f"--input={path}"]
    assert predict.main(options) == 0
    whole = capsys.readouterr()
    sizes = []
    encode = predictor.encode

    def noting(examples, *arguments, **keywords):
        sizes.append(len(examples))
        return encode(examples, *arguments, **keywords)

    monkeypatch.setattr(predictor, "encode", noting)
    monkeypatch.setattr(predict, "WINDOW", 2)
    assert predict.main(options) == 0
    parts = capsys.readouterr()
    assert sizes == [1, 2, 2]
    assert parts.out == whole.out
    assert parts.err.splitlines()[:-1] == whole.err.splitlines()[:-1]  # but for the throughput
    assert "warning: 3 rows of" in parts.err


@pytest.mark.parametrize("name", ["texts", "table.csv", "objects.jsonl"])
def test_no_more_rows_are_read_than_the_window_has(tmp_path, monkeypatch, name):
    rows = {
        "texts": ["a film"] * 9,
        "table.csv": ["id\tsentence", *(f"{number}\ta film" for number in range(9))],
        "objects.jsonl": ['{"sentence": "a film"}'] * 9,
    }[name]
    path, count = lines_of(tmp_path / name, *rows), []
    read_lines = formats.read_lines

    def counting(*arguments, **keywords):
        for line in read_lines(*arguments, **keywords):
            count.append(line)
            yield line

    monkeypatch.setattr(formats, "read_lines", counting)
    windows = read_windows(path, SST, 4)
    assert len(next(windows)) == 4
    assert len(count) <= 5
    assert [len(window) for window in windows] == [4, 1]


def test_an_error_in_the_middle_leaves_the_output_as_it_was(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "WINDOW", 2)
    path, output = tmp_path / "texts", tmp_path / "output"
    path.write_bytes(b"good\nbad\nso so\n\xff\n")
    output.write_text("before")
    options = [str(run), "--task=sst", f"--input={path}", f"--output={output}", f"--skipped={tmp_path / 'skipped'}"]
    with pytest.raises(UserError, match="line 4: not UTF-8"):
        predict.main(options)
    assert output.read_text() == "before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["output", "texts"]


def test_strict_refuses_a_pipe_at_the_row(run, monkeypatch, capsys):
    monkeypatch.setattr(predict, "WINDOW", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("good\nbad\n\nso so\n"))
    with pytest.raises(UserError, match="--strict: 1 row cannot be used: standard input, line 3, id 2: empty text"):
        predict.main([str(run), "--task=sst", "--input=-", "--strict"])
    assert [line.split(" , ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["0", "1"]


@pytest.mark.parametrize("content", ["\n\n", "id\tsentence\n", "id\tsentence\n1\t\n"])
def test_an_input_without_a_usable_row_is_refused_and_nothing_is_written(run, tmp_path, capsys, content):
    (tmp_path / "texts").write_text(content)
    with pytest.raises(UserError, match=r"is empty|no rows under its header|none of its 1 rows is usable; line 2"):
        predict.main([str(run), "--task=sst", f"--input={tmp_path / 'texts'}"])
    assert capsys.readouterr().out == ""


def test_only_files_that_are_read_are_checked(run, tmp_path, course_data):
    copy = shutil.copytree(run, tmp_path / "run")
    options = [str(copy), "--task=sst", f"--input={lines_of(tmp_path / 'texts', 'good')}"]
    unread = copy / "best" / "optimizer.safetensors"
    unread.write_bytes(b"altered")
    assert predict.main(options) == 0
    unread.unlink()
    assert evaluate.main([str(copy), f"--data={course_data}"]) == 0
    for file in (copy / "best").iterdir():
        if file.name in (MANIFEST, "progress.json"):
            continue
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        with pytest.raises(UserError, match=f"{file.name} was truncated or altered"):
            predict.main(options)
        file.write_bytes(before)


def test_texts_are_not_kept(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MINBERT_CACHE", str(tmp_path / "cache"))
    assert predict.main([str(run), "--task=sst", f"--input={lines_of(tmp_path / 'texts', 'good')}"]) == 0
    assert not (tmp_path / "cache").exists()


def test_the_throughput_is_shown(run, tmp_path, capsys):
    rates = r"in \d+\.\d s: \d+ examples/s, \d+ tokens/s"
    assert predict.main([str(run), "--task=sst", f"--input={lines_of(tmp_path / 'texts', 'good', 'bad')}"]) == 0
    assert re.fullmatch(rf"2 examples, \d+ tokens {rates}", capsys.readouterr().err.splitlines()[-1])
    assert evaluate.main([str(run)]) == 0
    assert re.search(rf"^\d+ examples, \d+ tokens {rates}$", capsys.readouterr().out, re.MULTILINE)
