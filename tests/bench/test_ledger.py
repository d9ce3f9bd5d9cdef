"""The ledger of machine code: what is compiled again, what is said of it, and when it counts as out of date."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cuda_kernels
import ledger
import pytest
from ledger import Ledger, Row, Unit

pytest.importorskip("triton", reason="triton's kernels are configured with it")
import source_hashes
from configurations import Compilation

VERSIONS = {"nvcc": "13.0", "triton": "3.9"}


def row(unit: Unit, registers: int = 40, kernel: str = "kernel") -> Row:
    numbers = dict.fromkeys(Row._fields, 1)
    names = {"compiler": unit.compiler, "unit": unit.name, "kernel": kernel, "source": unit.source}
    return Row(**{**numbers, **names, "sm": unit.architecture, "registers": registers})


CUDA, SMALL, LARGE = (
    Unit("nvcc", "sums.cu", 90, "aa"),
    Unit("triton", "norm, 64 columns", 80, "bb"),
    Unit("triton", "norm, 768 columns", 80, "cc"),
)


def ledger_of(*units: Unit) -> Ledger:
    return Ledger(VERSIONS, {unit.key: [row(unit)] for unit in units})


@pytest.fixture
def compiled(monkeypatch) -> list[Unit]:
    """What was compiled; today's units are these three, and all kernels take 41 registers from now on."""
    found: list[Unit] = []
    monkeypatch.setattr(ledger, "UNITS", {"nvcc": lambda: [CUDA], "triton": lambda: [SMALL, LARGE]})
    monkeypatch.setattr(
        ledger.ahead_of_time,
        "compile_all",
        lambda work, processes: (found.append(unit) or [row(unit, registers=41)] for unit in work),
    )
    return found


def test_a_file_has_sorted_lines_and_is_read_back():
    written = Ledger(VERSIONS, {CUDA.key: [row(CUDA, kernel="b<float, 2>"), row(CUDA)], SMALL.key: [row(SMALL)]})
    text = ledger.text_of(written)
    comment, *versions, names, one, other, last = text.splitlines()
    assert comment.startswith("# ")
    assert versions == ["# nvcc 13.0", "# triton 3.9"]
    assert names.startswith("compiler,unit,kernel,sm,registers,")
    assert (one.split(",")[2], other.split(",")[0], last.split(",")[0]) == ('"b<float', "nvcc", "triton")
    read = ledger.parse(text)
    assert (read.versions, read.rows) == (VERSIONS, written.rows)
    assert ledger.text_of(read) == text


def test_nothing_is_compiled_or_written_where_sources_are_those_of_the_ledger(compiled, capsys):
    assert ledger.compare(ledger_of(CUDA, SMALL, LARGE), VERSIONS, 1, None) == 0
    assert compiled == []
    assert capsys.readouterr().out == "no kernel has other machine code than in the ledger\n"


def test_a_changed_source_is_compiled_and_makes_the_ledger_out_of_date(compiled, capsys):
    before = ledger_of(CUDA, replace(SMALL, source="old"), LARGE)
    assert ledger.compare(before, VERSIONS, 1, None) == 1
    assert compiled == [SMALL]
    shown = capsys.readouterr()
    assert shown.out == "sm_80 norm, 64 columns: registers 40 -> 41\n"
    assert shown.err == "the ledger is out of date; write it anew: python bench/gpu/ledger.py --write\n"


def test_a_changed_source_of_the_same_machine_code_makes_it_out_of_date_too(compiled, capsys):
    old = Ledger(VERSIONS, {**ledger_of(CUDA, LARGE).by_unit, SMALL.key: [row(replace(SMALL, source="old"), 41)]})
    assert ledger.compare(old, VERSIONS, 1, None) == 1
    assert capsys.readouterr().out == "no kernel has other machine code than in the ledger\n"


def test_kernels_that_are_gone_and_new_are_named(compiled, capsys):
    gone = Unit("nvcc", "differences.cu", 90, "dd")
    assert ledger.compare(ledger_of(CUDA, gone, SMALL), VERSIONS, 1, None) == 1
    assert capsys.readouterr().out.splitlines() == [
        "sm_90 differences.cu: kernel: gone",
        "sm_80 norm, 768 columns: new",
    ]


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({**VERSIONS, "triton": "3.10"}, "triton is 3.10, and the ledger is of 3.9: they are not compared"),
        ({"nvcc": None, "triton": "3.9"}, "nvcc is not here: its kernels are not compared"),
    ],
)
def test_kernels_of_another_compiler_or_of_none_are_not_compared(versions, said, compiled, capsys):
    stale = "triton" if versions["triton"] != "3.9" else "nvcc"
    units = [replace(unit, source="old") if unit.compiler == stale else unit for unit in (CUDA, SMALL, LARGE)]
    assert ledger.compare(ledger_of(*units), versions, 1, None) == 0
    assert compiled == []
    assert said in capsys.readouterr().out.splitlines()


def test_what_is_written_is_up_to_date_and_keeps_the_rows_of_a_compiler_that_is_not_here(compiled, tmp_path, capsys):
    path, versions = tmp_path / "ledger.csv", {"nvcc": None, "triton": "3.10"}
    assert ledger.compare(ledger_of(CUDA, SMALL, LARGE), versions, 1, path) == 0
    assert compiled == [SMALL, LARGE]
    assert "triton 3.9 -> 3.10" in capsys.readouterr().out
    written = ledger.read(path)
    assert written.versions == {"nvcc": "13.0", "triton": "3.10"}
    assert written.rows == [row(CUDA), row(SMALL, 41), row(LARGE, 41)]
    assert ledger.compare(written, versions, 1, None) == 0
    assert compiled == [SMALL, LARGE]


def test_writing_again_after_an_interruption_compiles_the_rest(compiled, tmp_path, monkeypatch):
    path = tmp_path / "ledger.csv"
    monkeypatch.setattr(ledger, "SAVE_AFTER", 1)
    whole = ledger.ahead_of_time.compile_all

    def interrupted(work, processes):
        yield from whole(work[:2], processes)
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger.ahead_of_time, "compile_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ledger.compare(ledger_of(), VERSIONS, 1, path)
    monkeypatch.setattr(ledger.ahead_of_time, "compile_all", whole)
    assert ledger.compare(ledger.read(path), VERSIONS, 1, path) == 0
    assert compiled == [CUDA, SMALL, LARGE]


def test_only_as_many_are_compiled_as_wanted_and_the_rest_is_counted(compiled, capsys):
    assert ledger.compare(ledger_of(), VERSIONS, 1, None, most=1) == 1
    assert compiled == [CUDA]
    assert capsys.readouterr().out.splitlines()[-1] == "2 more were not compiled"


def test_the_ledger_of_a_commit_is_compared_with(monkeypatch):
    texts = {"HEAD~1:./ledger.csv": ledger.text_of(ledger_of(CUDA, SMALL))}

    def show(command, **options):
        text = texts.get(command[-1])
        return subprocess.CompletedProcess(command, int(text is None), text or "", "")

    monkeypatch.setattr(ledger.subprocess, "run", show)
    assert ledger.since("HEAD~1", ledger_of(CUDA, SMALL)) == ["no kernel has other machine code"]
    assert ledger.since("HEAD~1", ledger_of(CUDA)) == ["sm_80 norm, 64 columns: gone"]
    assert ledger.since("HEAD~2", ledger_of(CUDA)) == ["there is no ledger to compare with"]


# Hashes of sources -----------------------------------------------------------------------------------------------

KERNEL = '''
import triton
import triton.language as tl
from typing import NamedTuple

FACTOR = 3
OTHER = 4


class Shape(NamedTuple):
    """Of a tile."""
    rows: int


def helper(x):
    """Twice."""
    return x * 2  # and no more


def kernel(x, SHAPE):
    y = helper(x) + FACTOR
    return y


def launch(x):
    return kernel(x, Shape(3))
'''


def kernel_hash(tmp_path: Path, old: str = "", new: str = "", **options: object) -> str:
    """The hash of the kernel with `old` replaced by `new`, in a module of its own."""
    assert old in KERNEL
    path = tmp_path / f"module_{len(list(tmp_path.iterdir()))}.py"
    path.write_text(KERNEL.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location("kernels_to_hash", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels_to_hash"] = module
    spec.loader.exec_module(module)
    given = {"x": "*fp32"}, {"SHAPE": module.Shape(3)}, ("x",), 4, 3
    return source_hashes.of_triton(replace(Compilation("a kernel", module.kernel, *given), **options), 90)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# and no more", "# or so"),
        ('"""Twice."""', '"""Two times."""'),
        ("FACTOR = 3", "\n\nFACTOR = 3"),
        ("x * 2", "(x  *  2)"),
        ("OTHER = 4", "OTHER = 5"),
        ("Shape(3))", "Shape(4))"),
    ],
)
def test_what_a_kernel_is_not_compiled_from_does_not_change_its_hash(old, new, tmp_path):
    assert kernel_hash(tmp_path, old, new) == kernel_hash(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [("x * 2", "x * 3"), ("FACTOR = 3", "FACTOR = 4"), ("rows: int", "columns: int"), ("return y", "return -y")],
)
def test_the_code_that_a_kernel_names_changes_its_hash(old, new, tmp_path):
    assert kernel_hash(tmp_path, old, new) != kernel_hash(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"signature": {"x": "*bf16"}}, {"divisible": ()}, {"num_warps": 8}, {"num_stages": 2}, {"options": {}}],
    ids=lambda options: next(iter(options)),
)
def test_how_a_kernel_is_compiled_changes_its_hash(options, tmp_path):
    assert kernel_hash(tmp_path, **options) != kernel_hash(tmp_path)


def test_comments_of_a_cuda_file_do_not_change_its_hash_and_a_header_does(tmp_path):
    (tmp_path / "cuda").mkdir()
    file, header = tmp_path / "cuda" / "sums.cu", tmp_path / "lanes.h"
    file.write_text('#include "lanes.h"\n__global__ void sums() {}\n')
    header.write_text("constexpr int kLanes = 256;\n")
    before = source_hashes.of_cuda(file, tmp_path, ("-O3",))
    file.write_text('// Sums.\n#include "lanes.h"\n\n__global__ void  sums() /* nothing\nyet */ {}\n')
    assert source_hashes.of_cuda(file, tmp_path, ("-O3",)) == before
    assert source_hashes.of_cuda(file, tmp_path, ("-O2",)) != before
    header.write_text("constexpr int kLanes = 128;\n")
    assert source_hashes.of_cuda(file, tmp_path, ("-O3",)) != before


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not on PATH")
@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        (
            "_ZN7minbert43_GLOBAL__N__ba17053c_10_surgery_cu_b632169314combine_kernelIfLi2EEEvNS_9TaskTableEPKd",
            "combine_kernel<float, 2>",
        ),
        ("_ZN7minbert43_GLOBAL__N__00000000_10_surgery_cu_000000005plainEPFvvE", "plain"),
    ],
)
def test_a_kernels_name_does_not_depend_on_its_files_path(mangled, name):
    assert cuda_kernels.short_name(mangled) == name
