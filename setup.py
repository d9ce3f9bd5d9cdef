"""Builds the native extension `minbert.kernels._native` with CMake. The rest of the packaging is in pyproject.toml.

The extension is optional: without a C++17 compiler the install succeeds, `pip install -v` shows why the build failed,
and `minbert.kernels` runs its reference ops and says so. `MINBERT_CUDA=1` makes it, with its CUDA part, a requirement.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


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


class CMakeBuild(build_ext):
    """`build_ext` that hands the one extension to CMake and Ninja, both taken from `[build-system].requires`."""

    def build_extension(self, ext: Extension) -> None:
        cuda = cuda_choice()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        try:
            self._cmake("--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", *self._settings(cuda, target.parent))
            self._cmake("--build", build)
        except (subprocess.CalledProcessError, ImportError) as error:
            if cuda == "1":
                raise SystemExit(f"MINBERT_CUDA=1, and the native extension did not build: {error}") from error
            raise CompileError(
                "CMake could not build the native kernels (see above), and minbert is installed without them: slower "
                "reference ops run instead. Install a C++17 compiler (GCC or Clang) and then minbert again"
            ) from error

    @staticmethod
    def _settings(cuda: str, output: Path) -> list[str]:
        import ninja
        import pybind11

        return [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMINBERT_CUDA={cuda}",
        ]

    @staticmethod
    def _cmake(*arguments: "str | Path") -> None:
        subprocess.run([sys.executable, "-m", "cmake", *map(str, arguments)], check=True)


KERNELS = ["minbert.kernels", "minbert.kernels.reference", "minbert.kernels.triton"]
setup(
    packages=[*find_packages(include=["minbert", "minbert.*"]), *KERNELS],
    ext_modules=[Extension("minbert.kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
