"""Every example in docs/examples runs as it stands, is short, and prints something."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.py"))
assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    needs = path.stem.partition("_")[0]
    if needs in ("transformers", "lightning") and find_spec(needs) is None:
        pytest.skip(f"needs {needs}, of the extra [test]")
    if path.stem.endswith("trainer") and find_spec("accelerate") is None:
        pytest.skip("needs accelerate, of the extra [test]")
    assert len(path.read_text().splitlines()) < 100
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3
    assert not list(tmp_path.iterdir())
