"""Imports go one way, from room to room and from module to module: docs/architecture.md draws them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIAGRAM = re.search(
    r"<!-- rooms -->\n```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.DOTALL
)
assert DIAGRAM is not None, "docs/architecture.md has no diagram of the imports"
# A room imports only from itself and the rooms above.
ROOMS = [line[2:].split("  ")[0].split(", ") for line in DIAGRAM[1].splitlines()]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}


def modules() -> dict[str, Path]:
    """All modules of minbert by their dotted names."""
    found = {}
    for folder, package in (("minbert", "minbert"), ("kernels", "minbert.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[0] != "kernels":  # a link to ../kernels
                found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imported(name: str, *, later: bool = False) -> set[str]:
    """The modules of minbert that a module imports when it is imported, and with `later` those of its functions.

    `from package import name` imports the module that the name is, or else the package.
    """
    path = MODULES[name]
    package = (name if path.name == "__init__.py" else name.rpartition(".")[0]).split(".")
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if later else at_import(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return names & MODULES.keys() - {name}


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The import statements that run when a module is imported: none in functions, none for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not isinstance(child, ast.FunctionDef) and "TYPE_CHECKING" not in ast.unparse(child).split("\n")[0]:
            yield from at_import(child)


def room(name: str) -> str:
    """The room of a module; the entry of `python -m PACKAGE` is a command, wherever its package is."""
    return "__main__" if name.endswith(".__main__") else name.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_its_room_and_those_above(name):
    if name == "minbert":
        assert not imported(name)
        return
    assert room(name) in LEVEL, f"give {room(name)} a line in docs/architecture.md"
    below = {other for other in imported(name, later=True) if LEVEL.get(room(other), 0) > LEVEL[room(name)]}
    assert not below


def test_the_diagram_has_every_room_once():
    drawn = [name for names in ROOMS for name in names]
    assert sorted(drawn) == sorted({room(name) for name in MODULES} - {""})


def test_no_import_cycles():
    """Not even by imports that wait for a call, or that are for type checkers alone."""
    modules = MODULES.keys() - {"minbert", "minbert.kernels"}
    TopologicalSorter({name: imported(name, later=True) & modules for name in modules}).prepare()


def test_kernels_import_nothing_of_minbert():
    for name in MODULES:
        if room(name) == "kernels":
            assert {room(other) for other in imported(name, later=True)} <= {"kernels"}, name


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
