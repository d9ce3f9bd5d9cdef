"""Builds the native extension in place for the GPU that is here, by CMake alone, and makes this tree importable.

Neither pip nor setuptools takes part: a machine without a network may have one that is too old for pyproject.toml.
CUDAARCHS chooses other architectures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def architectures() -> str:
    """Of the GPUs that nvidia-smi lists, machine code alone."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return ";".join(sorted({capability.replace(".", "") + "-real" for capability in found}))


def link_kernels(root: Path = ROOT) -> None:
    """kernels/ is imported as minbert.kernels, which an installed package knows and a bare tree does not."""
    link = root / "minbert" / "kernels"
    if not link.exists():
        link.symlink_to("../kernels")


def commands(root: Path, build: Path, cuda_architectures: str) -> list[list[str]]:
    """Configure, then build with a job for each core."""
    import pybind11

    cmake = [shutil.which("cmake")] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(root / "kernels"),
        "CMAKE_CUDA_ARCHITECTURES": cuda_architectures,
        "MINBERT_CUDA": "1",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    if not shutil.which("ninja"):
        import ninja

        settings["CMAKE_MAKE_PROGRAM"] = str(Path(ninja.BIN_DIR) / "ninja")
    options = [f"-D{name}={value}" for name, value in settings.items()]
    return [
        [*cmake, "-S", str(root), "-B", str(build), "-G", "Ninja", *options],
        [*cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)],
    ]


if __name__ == "__main__":
    link_kernels()
    for command in commands(ROOT, ROOT / "build" / "gpu" / "cmake", os.environ.get("CUDAARCHS") or architectures()):
        if code := subprocess.run(command).returncode:
            sys.exit(code)
