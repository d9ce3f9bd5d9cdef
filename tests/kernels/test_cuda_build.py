"""What nvcc makes of every CUDA kernel: no spills, few registers, and 16 bytes at a time where memory is the limit.

Kernels are found in the compiled code: a new one falls under these rules without being named here.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # nvcc compiles every file

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100)
REGISTERS = 128  # of a thread: 512 threads of a multiprocessor run at once
SHARED_MEMORY = 48 * 1024  # bytes of a block, without asking the driver for more

# Kernels, by a part of their mangled names, that may take more registers or move less than 16 bytes at a time, and why.
MORE_REGISTERS = {
    "ascend_tokens_kernelIfLi8E": (168, "keeps three rows of up to 1024 float32 numbers"),
    "task_weights_kernel": (200, "runs in blocks of at most 16 threads"),
}
NARROW_LOADS = {
    "dropout_mask_kernel": "reads two numbers, the seed and the first row's",
    "7Singles": "for rows that do not lie at multiples of 16 bytes",
    "gram_of_chunks_kernel": "reads one number of each chunk",
    "surgery_weights_kernel": "reads T x T numbers",
    "task_weights_kernel": "likewise",
}
NARROW_STORES = {
    "dropout_mask_kernel": "writes bytes; training never asks for it: there masks are made where they are used",
    "7Singles": NARROW_LOADS["7Singles"],
    "gram_kernel": "writes one number a block for each pair of tasks",
    "gram_of_many_kernel": "likewise",
    "gram_of_chunks_kernel": "writes T x T numbers",
    "surgery_weights_kernel": "writes T numbers",
    "task_weights_kernel": "likewise",
}


@dataclass(frozen=True)
class Kernel:
    """One kernel's code for one architecture."""

    name: str  # mangled
    architecture: int
    registers: int
    shared_memory: int
    stack: int
    spilled: int
    sass: str

    def __str__(self) -> str:
        return f"{self.name} for sm_{self.architecture}"

    def loads_or_stores(self, instruction: str) -> bool:
        """Whether it holds such an instruction, "LDG" or "STG", of 16 bytes or more."""
        return re.search(rf"\b{instruction}\.E(\.\w+)*\.(128|256)\b", self.sass) is not None


def cuobjdump() -> str | None:
    """On PATH, or where Triton brings it along."""
    triton = importlib.util.find_spec("triton")
    folders = (
        [Path(place) / "backends/nvidia/bin" for place in triton.submodule_search_locations or ()] if triton else []
    )
    found = (shutil.which("cuobjdump", path=path) for path in (None, *map(str, folders)))
    return next(filter(None, found), None)


def number(pattern: str, report: str) -> int:
    """The number that a pattern finds, 0 where ptxas says nothing of it."""
    found = re.search(pattern, report)
    return int(found[1]) if found else 0


def compiled(source: Path, architecture: int, folder: Path) -> Iterator[Kernel]:
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    options = ["-std=c++17", "-O3", "-DNDEBUG", "-I", CSRC, "-gencode", target, "-cubin", "-Xptxas", "-v"]
    report = subprocess.run(["nvcc", *options, source, "-o", cubin], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    disassembly = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", disassembly, re.DOTALL))
    for entry in report.stderr.split("Compiling entry function ")[1:]:
        name = entry.split("'")[1]
        yield Kernel(
            name=name,
            architecture=architecture,
            registers=number(r"Used (\d+) registers", entry),
            shared_memory=number(r"(\d+) bytes smem", entry),
            stack=number(r"(\d+) bytes stack frame", entry),
            spilled=number(r"(\d+) bytes spill stores", entry) + number(r"(\d+) bytes spill loads", entry),
            sass=sass[name],
        )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    if cuobjdump() is None:
        pytest.skip("cuobjdump is neither on PATH nor in an installed triton")
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(source, a, folder) for source in SOURCES for a in ARCHITECTURES if f"compute_{a}" in known]
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(lambda job: list(compiled(*job)), jobs) for kernel in kernels]


def excused(kernel: Kernel, table: dict[str, str]) -> bool:
    return any(part in kernel.name for part in table)


def test_every_file_has_kernels_for_every_architecture(kernels: list[Kernel]) -> None:
    wanted = sum(source.read_text().count("__global__") > 0 for source in SOURCES)
    architectures = {kernel.architecture for kernel in kernels}
    assert wanted == len(SOURCES)
    assert architectures
    by_architecture = {a: {kernel.name for kernel in kernels if kernel.architecture == a} for a in architectures}
    assert len({len(names) for names in by_architecture.values()}) == 1
    for part in (*MORE_REGISTERS, *NARROW_LOADS, *NARROW_STORES):
        assert any(part in kernel.name for kernel in kernels), f"no kernel is named {part} any more"


def test_no_kernel_spills_or_has_local_memory(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert (kernel.spilled, kernel.stack) == (0, 0), kernel
        assert not re.search(r"\b(LDL|STL)\b", kernel.sass), kernel


def test_kernels_stay_within_their_registers_and_shared_memory(kernels: list[Kernel]) -> None:
    assert all(kernel.registers > 0 for kernel in kernels)
    for kernel in kernels:
        limits = [limit for part, (limit, _) in MORE_REGISTERS.items() if part in kernel.name]
        assert kernel.registers <= max(limits, default=REGISTERS), kernel
        assert kernel.shared_memory <= SHARED_MEMORY, kernel


def test_memory_is_read_and_written_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.loads_or_stores("LDG") or excused(kernel, NARROW_LOADS), kernel
        assert kernel.loads_or_stores("STG") or excused(kernel, NARROW_STORES), kernel
