"""What nvcc makes of every CUDA kernel: no spills, few registers, and 16 bytes at a time where memory is the limit.

Kernels are found in the compiled code: a new one falls under these rules without being named here. What is in the
ledger (bench/gpu/ledger.csv) of the same source and the same nvcc is not compiled again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import configurations
import cuda_kernels
import pytest

pytest.importorskip("triton", reason="triton brings cuobjdump along")
import ledger
from ledger import Row, Unit

pytestmark = pytest.mark.slow  # nvcc compiles a file, or all of them where the ledger is not of this nvcc

REGISTERS = 128  # of a thread: 512 threads of a multiprocessor run at once
SHARED_MEMORY = 48 * 1024  # bytes of a block, without asking the driver for more

# Kernels, by a part of their names, that may take more registers or move less than 16 bytes at a time, and why.
MORE_REGISTERS = {
    "ascend_tokens_kernel<float, 8": (168, "keeps three rows of up to 1024 float32 numbers"),
    "task_weights_kernel": (200, "runs in blocks of at most 16 threads"),
}
NARROW_LOADS = {
    "dropout_mask_kernel": "reads two numbers, the seed and the first row's",
    "Singles": "for rows that do not lie at multiples of 16 bytes",
    "gram_of_chunks_kernel": "reads one number of each chunk",
    "surgery_weights_kernel": "reads T x T numbers",
    "task_weights_kernel": "likewise",
}
NARROW_STORES = {
    "dropout_mask_kernel": "writes bytes; training never asks for it: there masks are made where they are used",
    "Singles": NARROW_LOADS["Singles"],
    "gram_kernel": "writes one number a block for each pair of tasks",
    "gram_of_many_kernel": "likewise",
    "gram_of_chunks_kernel": "writes T x T numbers",
    "surgery_weights_kernel": "writes T numbers",
    "task_weights_kernel": "likewise",
}


def title(kernel: Row) -> str:
    return f"{kernel.kernel} of {kernel.unit} for sm_{kernel.sm}"


@pytest.fixture(scope="module")
def in_the_ledger() -> dict[Unit, list[Row]]:
    """By what is compiled at once, its kernels in the ledger; none that are not of this source and this nvcc."""
    version, found = cuda_kernels.version(), ledger.read()
    if version is None:
        pytest.skip("nvcc is not on PATH")
    return {unit: found.of(unit) if found.versions.get("nvcc") == version else [] for unit in ledger.cuda_units()}


@pytest.fixture(scope="module")
def kernels(in_the_ledger: dict[Unit, list[Row]]) -> list[Row]:
    stale = [unit for unit, rows in in_the_ledger.items() if not rows]
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(Unit.run, stale))
    return [row for rows in (*in_the_ledger.values(), *compiled) for row in rows]


def excused(kernel: Row, table: dict[str, str]) -> bool:
    return any(part in kernel.kernel for part in table)


def test_the_ledger_has_what_nvcc_makes(in_the_ledger: dict[Unit, list[Row]]) -> None:
    unit = next(unit for unit in in_the_ledger if unit.name == "dropout_mask.cu")
    if not in_the_ledger[unit]:
        pytest.skip("the ledger is of another nvcc, or out of date: all kernels are compiled")
    assert sorted(unit.run()) == sorted(in_the_ledger[unit])


def test_every_file_has_kernels_for_every_architecture(kernels: list[Row]) -> None:
    wanted = sum(source.read_text().count("__global__") > 0 for source in cuda_kernels.SOURCES)
    architectures = {kernel.sm for kernel in kernels}
    assert architectures == {*cuda_kernels.known(configurations.ARCHITECTURES)}
    assert wanted == len(cuda_kernels.SOURCES) == len({kernel.unit for kernel in kernels})
    by_architecture = {a: {(each.unit, each.kernel) for each in kernels if each.sm == a} for a in architectures}
    assert len({len(names) for names in by_architecture.values()}) == 1
    for part in (*MORE_REGISTERS, *NARROW_LOADS, *NARROW_STORES):
        assert any(part in kernel.kernel for kernel in kernels), f"no kernel is named {part} any more"


def test_no_kernel_spills_or_has_local_memory(kernels: list[Row]) -> None:
    for kernel in kernels:
        assert (kernel.spilled, kernel.local_accesses) == (0, 0), title(kernel)


def test_kernels_stay_within_their_registers_and_shared_memory(kernels: list[Row]) -> None:
    assert all(kernel.registers > 0 for kernel in kernels)
    for kernel in kernels:
        limits = [limit for part, (limit, _) in MORE_REGISTERS.items() if part in kernel.kernel]
        assert kernel.registers <= max(limits, default=REGISTERS), title(kernel)
        assert kernel.shared <= SHARED_MEMORY, title(kernel)


def test_memory_is_read_and_written_16_bytes_at_a_time(kernels: list[Row]) -> None:
    for kernel in kernels:
        assert kernel.wide_loads or excused(kernel, NARROW_LOADS), title(kernel)
        assert kernel.wide_stores or excused(kernel, NARROW_STORES), title(kernel)
