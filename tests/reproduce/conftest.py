"""A sweep over a paper's rows that takes a second."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fake_process import FakeProcess
from groups import SWEEP_OPTIONS

from minbert import reproduce, train
from minbert.errors import UserError
from minbert.training import child_process


@pytest.fixture
def sweep(course_data, tmp_path):
    """`sweep(PAPER, options)`: the exit code of a sweep of one-step runs of a very small encoder."""
    (tmp_path / "small.yaml").write_text(SWEEP_OPTIONS)
    shared = [f"--data={course_data}", f"--options={tmp_path / 'small.yaml'}", f"--out={tmp_path / 'out'}"]
    return lambda number, *options: reproduce.main([number, *shared, "--steps=1", *options])


@pytest.fixture
def in_process(monkeypatch):
    """The command lines of the runs that a sweep starts; they run in this process."""
    calls = []

    def start(words, **rest):
        calls.append(words[3:])
        try:
            code, said = train.main(words[3:]), []
        except UserError as error:
            code, said = 2, [f"error: {error}\n"]
        return FakeProcess(lambda: code, said)

    monkeypatch.setattr(child_process, "subprocess", SimpleNamespace(Popen=start, PIPE=None))
    return calls
