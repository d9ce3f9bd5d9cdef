"""Imports go one way: csrc -> kernels -> packing, data, model -> losses -> smart, surgery -> step -> train."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [  # a module imports only from its own room and the rooms above
    ["errors"],
    ["json_yaml"],
    ["records"],
    ["files", "seeds", "signals", "tasks", "kernels", "recipes", "weighting_state"],
    ["ranks"],
    ["packing", "hub"],
    ["tokenizer_files"],
    ["tokenizer"],
    ["data", "model"],
    ["losses", "metrics", "schedule", "optimizer", "surgery", "gradients", "transfer"],
    ["arena", "smart"],
    ["objective"],
    ["choices"],
    ["config", "cli", "device"],
    ["pending", "replay"],
    ["run_files"],
    ["checkpoint", "runs", "resume", "console", "step"],
    ["report", "evaluate", "workbench"],
    ["finish"],
    ["train", "predict", "reproduce", "augment"],
    ["integrations"],
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}


def imported(path: Path) -> set[str]:
    """The parts of minbert that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("minbert.")} & LEVEL.keys()


MODULES = sorted((ROOT / "minbert").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_above(path):
    name = path.relative_to(ROOT / "minbert").parts[0].removesuffix(".py")
    if name == "__init__":
        assert not imported(path)
        return
    assert name in LEVEL, f"give {name} a room in ROOMS"
    below = {other for other in imported(path) if LEVEL[other] > LEVEL[name]}
    assert not below


def test_kernels_import_nothing_of_minbert():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imported(path), path


def test_no_torch_header_and_nothing_unsafe():
    banned = ["torch/extension.h", "ATen/", "pickle.load", "weights_only=False", "retain_graph=True", "march=native"]
    for folder in ("csrc", "kernels", "minbert"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                text = path.read_text()
                assert not [word for word in banned if word in text], path


def test_importing_minbert_loads_no_optional_package():
    check = (
        "import sys, minbert.train, minbert.predict;"
        "print([n for n in ('triton', 'transformers', 'datasets', 'torchjd', 'matplotlib.pyplot') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
