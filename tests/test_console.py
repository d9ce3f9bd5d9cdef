"""What a command prints is text: no name, path or text in it is markup, an emoji or a control sequence."""

from __future__ import annotations

import re
import shutil
import sys
import types
from pathlib import Path

import pytest

from minbert import cli, evaluate, predict, train
from minbert.console import InferenceProgress, Terminal, TrainingProgress, data_table, score_table
from minbert.errors import UserError, one_line
from minbert.report import __main__ as report
from minbert.tasks import TASKS

TEXTS = ["d/a[/b]", "r/[v2] run", "[bold]x[/bold]", ":smile:", "[link=x]y", r"back\[slash", "12 'x' http://y"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_printed_as_it_is(text, capsys):
    Terminal().print(f"run directory: {text}")
    assert capsys.readouterr().out == f"run directory: {text}\n"
    Terminal(stderr=True).print(text)
    assert capsys.readouterr().err == f"{text}\n"
    Terminal(quiet=True).print(text)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", TEXTS)
def test_cells_and_titles_of_tables_are_text(text, capsys):
    Terminal().print(score_table(text, [(text, {"sst": {"accuracy": 0.5}}, 0.5)]))
    assert capsys.readouterr().out.count(text) == 2
    Terminal().rule(text, align="left")
    assert text in capsys.readouterr().out


def lines_of(table, capsys) -> list[list[str]]:
    Terminal().print(table)
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]


def test_scores_are_columns_or_with_many_of_them_rows(capsys):
    first = {"sst": {"accuracy": 0.5}, "sts": {"pearson": 0.25}}
    second = {"sst": {"accuracy": 0.6}, "sts": {"pearson": 0.75, "spearman": 0.7}}
    few = score_table("", [("one", first, 0.5), ("two", second, 0.6)])
    assert lines_of(few, capsys) == [
        ["sst", "sts", "sts"],
        ["accuracy", "pearson", "spearman", "overall"],
        ["one", "0.500", "0.250", "–", "0.500"],
        ["two", "0.600", "0.750", "0.700", "0.600"],
    ]
    many = {f"t{number}": {"accuracy": number / 10} for number in range(9)}
    assert lines_of(score_table("", [("one", many, 0.4), ("two", first, 0.5)]), capsys) == [
        ["one", "two"],
        *([f"t{number}", "accuracy", f"0.{number}00", "–"] for number in range(9)),
        ["sst", "accuracy", "–", "0.500"],
        ["sts", "pearson", "–", "0.250"],
        ["overall", "0.400", "0.500"],
    ]


@pytest.mark.parametrize("epochs", [1, 5, 20])
def test_tables_of_scores_are_as_narrow_as_a_terminal_and_complete(epochs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"task{number}-{'ab' * 4 * number}" for number in range(8)]
    rows = [
        (f"dev, epoch {epoch}", {name: {"f1": epoch + i / 100, "mae": 0.5} for i, name in enumerate(names)}, 0.25)
        for epoch in range(epochs)
    ]
    Terminal().print(score_table("all epochs", rows))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    numbers = [float(word) for line in lines for word in re.findall(r"\d+\.\d{3}", line)]
    further = epochs if epochs <= 7 else 0
    assert sorted(numbers) == sorted(
        [epoch + i / 100 for epoch in range(epochs) for i in range(8)] + [0.5] * 8 * further + [0.25] * epochs
    )
    assert all(any(f"dev, epoch {epoch}" in line for line in lines) for epoch in range(epochs))
    assert lines.count("all epochs") == 1


def test_many_epochs_of_many_scores_show_the_first_metric_of_each_task(capsys):
    scores = {f"t{number}": {"f1": number / 10, "accuracy": 0.9} for number in range(5)}
    rows = [(f"epoch{epoch}", scores, 0.5) for epoch in range(9)]
    assert lines_of(score_table("", rows), capsys) == [
        [f"t{number}" for number in range(5)],
        [*["f1"] * 5, "overall"],
        *([f"epoch{epoch}", *(f"0.{number}00" for number in range(5)), "0.500"] for epoch in range(9)),
    ]
    few = "\n".join(map(" ".join, lines_of(score_table("", rows[:7]), capsys)))
    assert few.count("accuracy") == 5


def test_control_characters_are_shown_and_not_obeyed(capsys):
    Terminal().print("a\x1b[2Jb\rc\x07d\u202ee\x9bf\ng")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\rc\\x07d\\u202ee\\x9bf\ng\n"
    Terminal().print(data_table([(TASKS["sst"], {"train": 1, "dev": 2}, 0, 0)]))
    assert "SST-5 sentiment" in capsys.readouterr().out
    assert one_line("naïve 猫 a\nb\tc\u2028d") == "naïve 猫 a\\nb\\tc\\u2028d"


def test_the_progress_bar_has_no_markup():
    with TrainingProgress(Terminal(), 2, 0) as display:
        display.update(1, "epoch [/1]", 1.0, 0.5)
        assert all(not getattr(column, "markup", False) for column in display.bar.columns)


@pytest.mark.parametrize(
    ("where", "installed", "shown"),
    [("terminal", False, True), ("notebook", True, True), ("notebook", False, False), ("file", True, False)],
)
def test_a_bar_is_shown_where_it_can_be_written_over(where, installed, shown, monkeypatch):
    """In a notebook by a widget; without widgets it would be a warning and a new line each time."""
    console = Terminal()
    monkeypatch.setattr(console, "_force_terminal", where == "terminal")
    monkeypatch.setattr(console, "is_jupyter", where == "notebook")
    monkeypatch.setattr("minbert.console.find_spec", lambda name: object() if installed else None)
    assert TrainingProgress(console, 2, 0).bar.disable == (not shown)
    assert InferenceProgress(console, 2).bar.disable == (not shown)


def test_the_bar_in_a_notebook_is_a_widget_that_goes_at_the_end(monkeypatch):
    """With the two modules of a notebook in its place."""
    shown, closed = [], []

    class Output:
        def __enter__(self) -> None:
            shown.append("in the widget")

        def __exit__(self, *exception: object) -> None:
            shown.append("after it")

        def clear_output(self, wait: bool) -> None:
            pass

        def close(self) -> None:
            closed.append(self)

    for name, module in {
        "ipywidgets": types.SimpleNamespace(Output=Output),
        "IPython": types.SimpleNamespace(),
        "IPython.display": types.SimpleNamespace(display=shown.append),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("minbert.console.find_spec", lambda name: object())
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with TrainingProgress(Terminal(), 4, 0) as display:
        display.update(2, "epoch 1/1", 7.0, 0.5)
        display.bar.refresh()
        (widget,) = (each for each in shown if isinstance(each, Output))
        place = shown.index("in the widget")
        texts = [each._repr_mimebundle_([], [])["text/plain"] for each in shown if hasattr(each, "_repr_mimebundle_")]
        assert place > shown.index(widget)
        assert any("epoch 1/1" in text and "2/4" in text and "7 examples/s, loss 0.500" in text for text in texts)
    assert closed == [widget]


def test_an_error_is_one_line_whatever_is_in_it(monkeypatch, capsys):
    def refuse(arguments):
        raise UserError("/a\nb/\x1b[31m[red]: no such directory")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit):
        cli.run(refuse)
    assert capsys.readouterr().err == "error: /a\\nb/\\x1b[31m[red]: no such directory\n"


def test_every_command_prints_through_the_terminal():
    """But what is data, such as predictions and pages of help, and modules that do without rich, which escape texts."""
    plain = ("cli.py", "__main__.py", "device.py", "doctor.py", "replay.py")
    for path in (Path(train.__file__).parent).rglob("*.py"):
        text = path.read_text()
        if path.name != "console.py":
            assert not re.search(r"\bConsole\(", text), path
        if path.name not in plain and "kernels" not in path.parts:
            assert not re.search(r"(?<![\w.])print\(", text), path


def test_paths_that_look_like_markup_are_paths(quick, course_data, tmp_path, capsys):
    data, run = tmp_path / "d" / "a[" / "b] :smile:", tmp_path / "r" / "[v2] run"
    shutil.copytree(course_data, data)
    options = [word for word in quick if not word.startswith(("--data", "--out", "--epochs"))]
    assert train.main([*options, f"--data={data}", f"--out={run}", "--steps=1"]) == 0
    shown = capsys.readouterr().out
    assert f"data: {data};" in shown
    assert f"run directory: {run}\n" in shown
    assert evaluate.main([str(run)]) == 0
    assert f"predictions in {run}/predictions/sst-dev-output.csv" in capsys.readouterr().out
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    (tmp_path / "[x].txt").write_text("the film\n")
    output = tmp_path / "[o].csv"
    assert predict.main([str(run), "--task=sst", f"--input={tmp_path / '[x].txt'}", f"--output={output}"]) == 0
    assert output.exists()
