"""Builds the native extension `minbert.kernels._native` with CMake. The rest of the packaging is in pyproject.toml.

The extension is optional: where it cannot be built the install succeeds, `pip install -v` shows why, and
`minbert.kernels` runs its reference ops and says so. An extension that was built before is removed first. By default
(`MINBERT_CUDA=auto`) it is built without its CUDA part where that does not compile; `MINBERT_CUDA=1` makes both a
requirement.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BIN_DIRECTORY = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}  # what the Python packages of these names call theirs


def cuda_choice() -> str:
    """MINBERT_CUDA: 0 (without CUDA), 1 (an error without it) or auto (with it where nvcc is found)."""
    choice = os.environ.get("MINBERT_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"MINBERT_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "1" and not (os.environ.get("CUDACXX") or shutil.which("nvcc")):
        raise SystemExit(
            "MINBERT_CUDA=1 but no nvcc on PATH; install the CUDA toolkit, set CUDACXX, or use MINBERT_CUDA=0"
        )
    return choice


def tool(name: str) -> Path:
    """The path of cmake or ninja: that of the Python package, or the one on PATH.

    Raises:
        ImportError: neither is there.
    """
    try:
        return Path(getattr(importlib.import_module(name), BIN_DIRECTORY[name])) / name
    except (ImportError, AttributeError) as error:
        if (found := shutil.which(name)) is None:
            raise ImportError(f"{name} is neither a Python package here nor on PATH") from error
        return Path(found)


class CMakeBuild(build_ext):
    """`build_ext` that hands the one extension to CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        cuda = cuda_choice()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        in_place = [ROOT / "kernels" / target.name] if self.editable_mode or self.inplace else []
        for built_before in (target, *in_place):
            built_before.unlink(missing_ok=True)
        try:
            try:
                self._build(cuda, target.parent)
            except subprocess.CalledProcessError:
                if cuda != "auto" or not (os.environ.get("CUDACXX") or shutil.which("nvcc")):
                    raise
                print("minbert: the native kernels did not build; once more without CUDA", file=sys.stderr)
                self._build("0", target.parent)
        except (subprocess.CalledProcessError, ImportError) as error:
            if cuda == "1":
                raise SystemExit(f"MINBERT_CUDA=1, and the native extension did not build: {error}") from error
            raise CompileError(
                f"CMake could not build the native kernels ({error}; pip install -v shows more), and minbert is"
                " installed without them: slower reference ops run instead. They need a C++17 compiler (GCC or Clang)"
                " and Python's headers (python3-dev), and with --no-build-isolation pybind11, cmake and ninja. Then"
                " install minbert again"
            ) from error

    def _build(self, cuda: str, output: Path) -> None:
        """Configure and compile.

        Raises:
            subprocess.CalledProcessError: that failed.
            ImportError: a tool is missing.
        """
        build, cmake = Path(self.build_temp).resolve() / "cmake", tool("cmake")
        settings = [cmake, "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", *self._settings(cuda, output)]
        for command in (settings, [cmake, "--build", build]):
            subprocess.run([*map(str, command)], check=True)

    @staticmethod
    def _settings(cuda: str, output: Path) -> list[str]:
        import pybind11

        return [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMINBERT_CUDA={cuda}",
        ]


KERNELS = ["minbert.kernels", "minbert.kernels.reference", "minbert.kernels.triton"]
setup(
    packages=[*find_packages(include=["minbert", "minbert.*"]), *KERNELS],
    ext_modules=[Extension("minbert.kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
