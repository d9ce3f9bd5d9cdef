"""A finished run whose data tries to inject markup into its report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from course import course_file, write_course_data
from pages import HOSTILE, SMALL

from minbert import train
from minbert.runs.run_directory import Run


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Course data, of which every sentiment's text on dev is hostile, and so is the folder's name."""
    directory = tmp_path_factory.mktemp("data") / "<i>data"
    directory.mkdir()
    write_course_data(directory)
    rows = [[f"s{i}", f"{i} {HOSTILE}", i % 5] for i in range(24)]
    course_file(directory / "ids-sst-dev.csv", ["id", "sentence", "sentiment"], rows)
    return directory


@pytest.fixture(scope="session")
def run(data, tmp_path_factory) -> Run:
    """A run of two epochs; to be read only."""
    path = tmp_path_factory.mktemp("report") / "run <u>1"
    assert train.main([f"--data={data}", f"--out={path}", "--recipe=smart-pcgrad", "--epochs=2", *SMALL]) == 0
    return Run(path)


@pytest.fixture
def copy(run, tmp_path) -> Run:
    """The same, to do with as one likes."""
    return Run(shutil.copytree(run.path, tmp_path / "copy"))
