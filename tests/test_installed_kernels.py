"""In the repository's root Python finds the source of minbert first; its kernels are those of the installed minbert."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
