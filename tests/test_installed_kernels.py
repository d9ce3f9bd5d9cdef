"""In the repository's root Python finds the source of minbert first; its kernels are those of the installed minbert."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import minbert
import minbert.kernels
from minbert import diagnosis

ROOT = Path(__file__).parents[1]


def test_the_source_takes_the_kernels_of_the_installed_package(tmp_path):
    source, installed = tmp_path / "root" / "minbert", tmp_path / "site" / "minbert"
    source.mkdir(parents=True)
    installed.mkdir(parents=True)
    for path in (ROOT / "minbert").iterdir():
        if path.name != "kernels":
            (source / path.name).symlink_to(path)
    (installed / "kernels").symlink_to(ROOT / "kernels")
    code = "import minbert, minbert.kernels as kernels; print(minbert.__file__, kernels.__file__, kernels.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "root",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["", str(tmp_path / "site")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(source / "__init__.py"),
        str(installed / "kernels" / "__init__.py"),
        "minbert.kernels",
    ]


def test_kernels_of_another_source_are_told(tmp_path, monkeypatch):
    own, other = tmp_path / "root" / "kernels", tmp_path / "other" / "kernels"
    for each in (own, other):
        shutil.copytree(ROOT / "kernels", each, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(minbert, "__file__", str(tmp_path / "root" / "minbert" / "__init__.py"))
    monkeypatch.setattr(minbert.kernels, "__file__", str(other / "__init__.py"))
    problems, commit = diagnosis.problems(), diagnosis.commit()
    (other / "checks.py").write_text("")
    told = f"minbert is that of {tmp_path / 'root'}, and its kernels, which differ, are those of {other}"
    assert [line for line in diagnosis.problems() if line not in problems] == [f"{told}; install {tmp_path / 'root'}"]
    if commit is not None:
        assert diagnosis.commit() == f"{commit.removesuffix('-dirty')}-dirty"
    monkeypatch.setattr(minbert.kernels, "__file__", str(own / "__init__.py"))
    assert diagnosis.problems() == problems
