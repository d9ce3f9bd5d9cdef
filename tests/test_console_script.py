"""`minbert COMMAND ...`: which commands there are, what runs them, and how they exit."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import minbert
from minbert import __main__ as console_script


def run(monkeypatch, *arguments: str) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["minbert", *arguments])
    with pytest.raises(SystemExit) as stop:
        console_script.main()
    return stop.value.code


@pytest.mark.parametrize("command", console_script.COMMANDS)
def test_a_command_is_the_main_of_a_module(command, monkeypatch):
    name, summary = console_script.COMMANDS[command]
    assert summary in console_script.overview()
    seen = []
    monkeypatch.setattr(importlib.import_module(name), "main", lambda arguments: seen.append(arguments) or 7)
    assert run(monkeypatch, command, "RUN", "--split", "test") == 7
    assert seen == [["RUN", "--split", "test"]]


@pytest.mark.parametrize("command", console_script.COMMANDS)
def test_a_command_says_its_name_in_its_help(command, monkeypatch, capsys):
    assert run(monkeypatch, command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: minbert {command} ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_alone_it_shows_the_commands_with_a_line_each(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minbert", *arguments])
    console_script.main()
    assert re.findall(r"^  (\w+) +\w", capsys.readouterr().out, re.MULTILINE) == list(console_script.COMMANDS)


def test_showing_the_commands_and_the_version_loads_no_torch():
    code = "import sys; from minbert.__main__ import main; main(); assert 'torch' not in sys.modules"
    for arguments in ([], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"minbert {minbert.__version__}\n"


def test_an_unknown_command_is_one_line_and_exit_code_2(monkeypatch, capsys):
    assert run(monkeypatch, "evalute", "RUN") == 2
    assert capsys.readouterr().err == (
        "error: unknown command evalute (did you mean 'evaluate'?); minbert alone lists them\n"
    )


def test_bad_input_of_a_command_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "evaluate", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none: no such run directory\n"


def test_python_m_minbert_is_the_same():
    done = subprocess.run([sys.executable, "-m", "minbert", "trian"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command trian (did you mean 'train'?)")


def test_the_script_is_installed():
    (script,) = entry_points(group="console_scripts", name="minbert")
    assert script.load() is console_script.main
