"""Every row of an input has its output, or the terminal, the run and its report name it with file, line, id and reason.

All commands read a format with the same code.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from groups import quick_options
from skipped_rows import NOUNS, course_file, listed, write_data

from minbert import augment, evaluate, predict, train
from minbert.errors import UserError
from minbert.report import write_report
from minbert.runs.run_directory import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, str]:
    """A run of one step on it, and what it printed."""
    path, printed = tmp_path_factory.mktemp("run") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        assert train.main([*quick_options(data, path), "--batch-size=4", "--steps=1"]) == 0
    return path, printed.getvalue()


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained[0]


def pairs(text: str) -> list[tuple[str, str]]:
    """(id, prediction) of predictions in the course's format."""
    return [tuple(line.rstrip().split(" , ")) for line in text.splitlines()[1:]]  # type: ignore[misc]


SST_BAD = {"e1": "empty text", "e2": "a quote is not closed", "e3": "label 'positive' is not a number", "e4": "outside"}


def test_training_names_the_rows_of_all_splits(trained, data):
    run, printed = trained
    rows = listed(run / "skipped.jsonl")
    found = {(row["split"], row["task"], row["id"]): row for row in rows}
    expected = {(split, "sst", identity) for split in ("train", "dev") for identity in SST_BAD}
    expected |= {(split, task, "8") for split in ("train", "dev", "test") for task in ("sts", "qqp")}
    assert found.keys() == expected | {("test", "sst", "e5"), ("test", "sst", "e6")}
    assert list(rows[0]) == ["split", "task", "file", "line", "id", "reason"]
    for identity, reason in SST_BAD.items():
        row = found["train", "sst", identity]
        assert (row["file"], row["line"]) == (str(data / "ids-sst-train.csv"), 4 + int(identity[1]))
        assert reason in row["reason"]
    for row in rows:
        assert f"  line {row['line']}, id {row['id']}: {row['reason']}" in printed
    assert f"warning: 4 rows of {data / 'ids-sst-train.csv'} left out:" in printed
    line = next(line for line in printed.splitlines() if "SST-5" in line)
    assert line.split()[2:5] == ["8", "8", "10"]


def test_the_report_lists_them_and_takes_their_text_for_text(trained, data):
    run, _ = trained
    page = (run / "report.html").read_text()
    for row in listed(run / "skipped.jsonl"):
        assert f"<td>{row['line']}</td><td><code>{row['id']}</code></td>" in page
        assert row["file"] in page
    before = (run / "skipped.jsonl").read_text()
    try:
        (run / "skipped.jsonl").write_text(before.replace("e5", "<b>x</b>").replace("empty text", "<script>1</script>"))
        page = write_report(Run(run)).read_text()
        assert "&lt;b&gt;x&lt;/b&gt;" in page
        assert "<script>1" not in page
        (run / "skipped.jsonl").unlink()
        assert "Rows left out" not in write_report(Run(run)).read_text()
    finally:
        (run / "skipped.jsonl").write_text(before)
        write_report(Run(run))


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"split": 1}', "\udcff", '{"split": "dev", "line": 1e400}', "[" * 9999]
)
def test_a_damaged_list_is_refused_in_one_line(trained, tmp_path, content):
    run, _ = trained
    before = (run / "skipped.jsonl").read_bytes()
    try:
        (run / "skipped.jsonl").write_bytes(before + content.encode("utf-8", "surrogateescape"))
        written = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        for command in (lambda: write_report(Run(run)), lambda: evaluate.main([str(run)])):
            with pytest.raises(UserError, match=r"skipped\.jsonl, line 17") as caught:
                command()
            assert "\n" not in str(caught.value)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == written
    finally:
        (run / "skipped.jsonl").write_bytes(before)


def test_evaluate_accounts_for_every_row_of_a_test_split(run, data, capsys):
    before = (run / "skipped.jsonl").read_text()
    assert evaluate.main([str(run), "--split=test"]) == 0
    printed = capsys.readouterr()
    predicted = pairs((run / "predictions" / "sst-test-output.csv").read_text())
    assert [identity for identity, _ in predicted] == [*(f"te{i}" for i in range(8)), "x1", "x2"]
    assert "10 predictions in " in printed.out
    assert "(2 of 12 rows left out; no labels in this split, so no accuracy)" in printed.out
    assert f"warning: 2 rows of {data / 'ids-sst-test-student.csv'} left out:" in printed.err
    assert "line 7, id e5: empty text" in printed.err
    assert "line 8, id e6: cannot split its fields" in printed.err
    assert (run / "skipped.jsonl").read_text() == before


def test_evaluate_says_how_many_rows_a_score_is_of(run, capsys):
    assert evaluate.main([str(run), "--tasks=sst"]) == 0
    assert "8 predictions in" in (out := capsys.readouterr().out)
    assert "(4 of 12 rows left out)" in out


def test_evaluating_again_replaces_the_rows_of_that_split_alone(data, run, tmp_path, capsys):
    before = listed(run / "skipped.jsonl")
    file = data / "ids-sst-dev.csv"
    text = file.read_text()
    try:
        file.write_text(text.replace("e1\t \t2\n", "").replace("e3\tgood\tpositive", "e3\tgood\t1"))
        assert evaluate.main([str(run), "--tasks=sst"]) == 0
        after = listed(run / "skipped.jsonl")
    finally:
        file.write_text(text)
    assert [row for row in after if row["split"] != "dev" or row["task"] != "sst"] == [
        row for row in before if row["split"] != "dev" or row["task"] != "sst"
    ]
    assert [row["id"] for row in after if (row["split"], row["task"]) == ("dev", "sst")] == ["e2", "e4"]
    assert evaluate.main([str(run), "--tasks=sst"]) == 0
    assert listed(run / "skipped.jsonl") == before


def test_what_is_not_of_the_best_epoch_or_the_runs_own_data_is_kept_apart(run, data, tmp_path, capsys):
    own = {path: path.read_bytes() for path in (run / "predictions").iterdir() if path.is_file()}
    own[run / "skipped.jsonl"] = (run / "skipped.jsonl").read_bytes()
    assert evaluate.main([str(run), "--checkpoint=last"]) == 0
    assert {path.name for path in (run / "predictions" / "last").iterdir()} == {
        path.name for path in own if "-dev" in path.name
    }
    other = tmp_path / "[red] other"
    other.mkdir()
    write_data(other)
    for options in ([], ["--checkpoint=last"]):
        assert evaluate.main([str(run), f"--data={other}", *options]) == 0
    for place in ("predictions", "predictions/last"):
        (directory,) = [path for path in (run / place).iterdir() if path.is_dir() and path.name not in ("last", "glue")]
        assert directory.name.startswith("_red__other-")
        assert (directory / "sst-dev-output.csv").exists()
        assert {row["file"] for row in listed(directory / "skipped.jsonl")} >= {str(other / "ids-sst-dev.csv")}
    assert {path: path.read_bytes() for path in own} == own
    link = tmp_path / "link"
    link.symlink_to(data)
    (run / "predictions" / "sst-dev-output.csv").unlink()
    assert evaluate.main([str(run), f"--data={link}"]) == 0  # the same data by another name
    assert len(listed(run / "skipped.jsonl")) == 16
    assert evaluate.main([str(run)]) == 0
    assert {path: path.read_bytes() for path in own} == own


@pytest.mark.parametrize(("task", "name"), [("sts", "STS-B/test.tsv"), ("qqp", "QQP/test.tsv")])
def test_predict_reads_glue_as_evaluate_does(run, data, task, name, capsys, monkeypatch):
    assert evaluate.main([str(run), "--split=test", f"--tasks={task}"]) == 0
    stem = {"sts": "sts", "qqp": "para"}[task]
    expected = pairs((run / "predictions" / f"{stem}-test-output.csv").read_text())
    capsys.readouterr()
    assert predict.main([str(run), f"--task={task}", f"--input={data / name}"]) == 0
    printed = capsys.readouterr()
    assert pairs(printed.out) == expected
    assert len(expected) == 8
    assert "line 10, id 8: expected 4 fields, found 3" in printed.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((data / name).read_bytes())))
    assert predict.main([str(run), f"--task={task}", "--input=-"]) == 0
    assert pairs(capsys.readouterr().out) == expected


def test_predict_keeps_the_lines_apart_that_line_feeds_end(run, tmp_path, capsys, monkeypatch):
    text = 'one\u2028two\n\nthird\x0cline\r\n\x85fourth\n"fifth\n'.encode()
    path = tmp_path / "lines.txt"
    path.write_bytes(text)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "ascii"))
    outputs = []
    for source in ("-", str(path)):
        assert predict.main([str(run), "--task=sst", f"--input={source}"]) == 0
        printed = capsys.readouterr()
        outputs.append(pairs(printed.out))
        assert "line 2, id 1: empty text" in printed.err
    assert outputs[0] == outputs[1]
    assert [identity for identity, _ in outputs[0]] == ["0", "2", "3", "4"]


@pytest.mark.parametrize("header", ['"id"\t"sentence"', "id \t sentence\t", "\ufeffid\tsentence"])
def test_predict_takes_the_headers_that_training_takes(run, tmp_path, header, capsys):
    path = tmp_path / "some.csv"
    course_file(path, header, [f"a{i}\t{noun}{header[9:].count(chr(9)) * chr(9)}" for i, noun in enumerate(NOUNS)])
    assert predict.main([str(run), "--task=sst", f"--input={path}"]) == 0
    assert [identity for identity, _ in pairs(capsys.readouterr().out)] == [f"a{i}" for i in range(8)]


def test_predict_lists_all_rows_where_it_is_told_and_counts_them(run, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    rows = [{"id": f"a{i}", "sentence": "\x01" if i == 8 else None if i % 8 else "good " * 600} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [str(run), "--task=sst", f"--input={path}", f"--skipped={tmp_path / 'left'}"]
    assert predict.main(options) == 0
    printed = capsys.readouterr()
    assert [identity for identity, _ in pairs(printed.out)] == ["a0", "a8"]
    assert f"warning: 7 rows of {path} left out:" in printed.err
    assert "line 6, id a5:" in printed.err
    assert "a6" not in printed.err
    assert f"and 2 more: {tmp_path / 'left'}" in printed.err
    assert "warning: 1 example cut to 512 tokens" in printed.err
    assert "warning: 1 example with a text without tokens" in printed.err
    assert [row["id"] for row in listed(tmp_path / "left")] == [f"a{i}" for i in range(1, 8)]


def test_strict_refuses_such_rows_before_anything_is_written(run, data, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    output = tmp_path / "output"
    more = tmp_path / "more.jsonl"
    for command, options in (
        (train, [*quick_options(data, tmp_path / "new"), "--batch-size=4"]),
        (evaluate, [str(run), "--split=test"]),
        (predict, [str(run), "--task=qqp", f"--input={data / 'QQP/test.tsv'}", f"--output={output}"]),
        (augment, [f"--data={data}", "--model=/nowhere", f"--out={more}"]),
    ):
        with pytest.raises(UserError, match=r"--strict: .*cannot be used: .*, line \d+, id \w+: "):
            command.main([*options, "--strict"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not any(path.exists() for path in (output, more, tmp_path / "new"))
    clean = data / "clean.txt"
    clean.write_text("good\n")
    assert predict.main([str(run), "--task=sst", f"--input={clean}", "--strict"]) == 0


def test_a_device_given_as_output_stays_what_it_is(run, tmp_path):
    (tmp_path / "lines").write_text("good\n")
    target = tmp_path / "target"
    target.symlink_to("/dev/null")
    assert predict.main([str(run), "--task=sst", f"--input={tmp_path / 'lines'}", f"--output={target}"]) == 0
    assert Path("/dev/null").is_char_device()
    assert target.is_symlink()
    with pytest.raises(UserError, match="cannot be written"):
        predict.main([str(run), "--task=sst", f"--input={tmp_path / 'lines'}", f"--output={tmp_path}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines", "target"]


def test_augment_names_what_it_leaves_out(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(augment.Translator, "__init__", lambda *arguments: None)
    monkeypatch.setattr(augment.Translator, "__call__", lambda self, texts, seed: [f"so {text}" for text in texts])
    out = tmp_path / "more.jsonl"
    assert augment.main([f"--data={data}", "--model=any", f"--out={out}"]) == 0
    assert len(listed(out)) == 8
    printed = "".join(capsys.readouterr())
    assert f"4 rows of {data / 'ids-sst-train.csv'} left out" in printed
    assert all(f"id {identity}" in printed for identity in SST_BAD)
