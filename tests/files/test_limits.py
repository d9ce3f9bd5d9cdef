"""The limits of docs/security.md: a file, a line or a number that is larger is refused in one line."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from mutate_files import FIXTURE

from minbert.data.tokenizer import Tokenizer
from minbert.errors import UserError
from minbert.files import json_yaml
from minbert.files.schema_checks import checked
from minbert.model import Encoder, EncoderConfig
from minbert.model.config import LARGEST
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS, read_tasks, tasks_file

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text().partition("## Limits")[2]
READS = {
    "config.yaml": (2**18, lambda run: run.config()),
    "summary.json": (2**24, lambda run: run.summary()),
    "metrics.jsonl": (2**28, lambda run: run.records()),
    "predictions/sst-dev.jsonl": (2**28, lambda run: run.predictions(TASKS["sst"], "dev")),
    "best/config.json": (2**24, lambda run: Encoder.from_pretrained(run.best)),
    "best/vocab.txt": (2**26, lambda run: Tokenizer.from_pretrained(run.best)),
    "best/tokenizer_config.json": (2**24, lambda run: Tokenizer.from_pretrained(run.best)),
    "tasks.yaml": (2**22, lambda run: read_tasks(run.path / "tasks.yaml")),
}


@pytest.fixture
def run(tmp_path) -> Run:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    (tmp_path / "run" / "best" / "tokenizer.json").unlink()
    return Run(tmp_path / "run")


@pytest.mark.parametrize("name", READS)
def test_a_file_is_read_up_to_its_limit(name, run):
    limit, read = READS[name]
    file = run.path / name
    file.touch()
    os.truncate(file, limit + 1)  # with zero bytes
    with pytest.raises(UserError, match=f"it is longer than {limit} bytes, the limit for such a file"):
        read(run)
    os.truncate(file, limit)
    said = ""
    try:
        read(run)
    except UserError as error:
        said = str(error)
    assert f"longer than {limit}" not in said


def test_a_line_is_read_up_to_its_limit(run):
    lines = run.metrics.path.read_text().splitlines()
    for more, problem in ((0, None), (1, f"longer than {2**20} bytes")):
        run.metrics.path.write_text("\n".join([lines[0][:-1] + " " * (2**20 - len(lines[0]) + more) + "}", ""]))
        if problem is None:
            assert len(run.records()) == 1
        else:
            with pytest.raises(UserError, match=problem):
                run.records()


@pytest.mark.parametrize("name", LARGEST)
def test_a_size_is_taken_up_to_its_limit(name):
    limit = LARGEST[name]
    fitting = {"hidden_size": limit} if name == "num_attention_heads" else {}
    EncoderConfig(**{"num_attention_heads": 1, **fitting, name: limit})
    with pytest.raises(UserError, match=f"{name} must be a positive whole number up to {limit}, got {limit + 1}"):
        EncoderConfig(**{"num_attention_heads": 1, **fitting, name: limit + 1})


@pytest.mark.parametrize(("kind", "limit", "more"), [(int, 2**63 - 1, 2**63), (float, 1e100, 1.1e100)])
def test_a_number_is_taken_up_to_its_limit(kind, limit, more):
    assert checked(limit, kind, "x") == limit
    assert checked(-limit, kind, "x") == -limit
    for value in (more, -more):
        with pytest.raises(UserError, match="x: expected"):
            checked(value, kind, "x")


def test_the_page_names_the_limits():
    for name, limit in LARGEST.items():
        (row,) = re.findall(rf"^\|[^|]*`{name}`.*$", PAGE, re.MULTILINE)
        power = limit.bit_length() - 1
        assert f"2^{power}" in row or str(limit) in row, row
    for limit in (json_yaml.OPTIONS_LIMIT, tasks_file.LIMIT, json_yaml.OBJECT_LIMIT, json_yaml.VOCABULARY_LIMIT):
        assert (f"{limit >> 20} MiB" if limit >= 2**20 else f"{limit >> 10} KiB") in PAGE
    for limit in (json_yaml.LINES_LIMIT, json_yaml.LINE_LIMIT):
        assert f"{limit >> 20} MiB" in PAGE
