"""Compiles the CUDA kernels of csrc/cuda for one architecture with nvcc; no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import machine_code

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
OPTIONS = ("-std=c++17", "-O3", "-DNDEBUG")


def version() -> str | None:
    """nvcc's, or None where it is not on PATH."""
    if shutil.which("nvcc") is None:
        return None
    shown = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+[\d.]*)", shown)
    return found[1] if found else shown.strip()


def known(architectures: Sequence[int]) -> list[int]:
    """Those of the architectures that nvcc compiles for."""
    shown = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [each for each in architectures if f"compute_{each}" in shown]


def compiled(source: Path, architecture: int) -> Iterator[tuple[str, str]]:
    """The kernels of a file: name, and resources and machine code as `cuobjdump` prints them.

    Raises:
        RuntimeError: nvcc finds errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        command = ["nvcc", *OPTIONS, "-I", str(CSRC), "-gencode", target, "-cubin", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        text = machine_code.disassemble(cubin.read_bytes())
    usage = dict(re.findall(r"^ Function (\S+):\n(.*)", text, re.MULTILINE))
    for mangled, code in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL):
        yield short_name(mangled), f"{usage[mangled]}\n{code}"


def short_name(mangled: str) -> str:
    """A kernel's name with its template arguments: without namespaces, of which one depends on the file's path."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("minbert::", "")
    depth = 0
    for at in range(len(name) - 1, -1, -1):  # back over the types of the arguments, which are in parentheses
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            return name[:at] if name[at] == "(" else name
    return name
