"""docs/own-tasks.md, run as a newcomer would run it: the data, the record, every command."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import blocks, text_of

from minbert.tasks.task import METRICS_OF
from minbert.tasks.tasks_file import INTERNAL, Record

PAGE = text_of(Path(__file__).parents[1] / "docs" / "own-tasks.md")


def test_every_key_and_metric_is_on_the_page():
    keys = PAGE.partition("## The record")[2].partition("## Files")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \| ", keys, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == {*Record.__dataclass_fields__} - {*INTERNAL, "thresholds"}
    metrics = PAGE.partition("## Metrics")[2]
    for kind, names in METRICS_OF.items():
        (row,) = re.findall(rf"^\| `{kind}` \| (.*) \|$", metrics, re.MULTILINE)
        assert {*re.findall(r"`(\w+)`", row)} >= {*names}


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    """All of its commands, with fewer epochs; then the scores of a run as long as on the page are good."""
    (code,), (record,), (commands,) = (blocks(PAGE, language) for language in ("python", "yaml", "bash"))
    (tmp_path / "make_data.py").write_text(code)
    (tmp_path / "tasks.yaml").write_text(record)

    def run(command: str, text: str | None = None) -> str:
        programs = {"python": [sys.executable], "minbert": [sys.executable, "-m", "minbert"]}
        first, *words = shlex.split(command)
        done = subprocess.run(
            [*programs[first], *words], cwd=tmp_path, input=text, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("python make_data.py")
    found = []
    for line in commands.splitlines():
        text, _, command = line.rpartition(" | ")
        found.append(run(command, subprocess.check_output(text, shell=True, text=True) if text else None))
    understood, trained, evaluated, topic, tags, stars = found
    assert re.search(r"billing\D+\d+", understood)
    scores = [float(number) for number in re.findall(r"\d\.\d{3}", evaluated.partition("overall")[2].split("\n\n")[0])]
    assert scores[-1] > 0.8, (trained, evaluated)
    assert "shipping" in topic
    assert "urgent" in tags
    ((_, star),) = [row.split(",") for row in stars.splitlines()[1:]]
    assert 1 <= float(star) <= 5
