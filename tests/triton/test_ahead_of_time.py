"""Every shipped configuration of the Triton kernels compiles for every architecture and keeps its limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ahead_of_time
import configurations
import ledger
import pytest


def compile_in_a_process_of_its_own(*options: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    report = Path(os.environ["MINBERT_CACHE"]) / "ahead_of_time-of-time.json"
    report.unlink(missing_ok=True)
    done = in_a_process_of_its_own(ahead_of_time.__file__, "--json", str(report), *options)
    return done, json.loads(report.read_text()) if report.exists() else []


def in_a_process_of_its_own(*command: str) -> subprocess.CompletedProcess[str]:
    """The interpreter, which these tests run under, compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])  # sample_kernels
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def test_configurations_have_unique_names_and_give_every_argument_of_their_kernels():
    found = configurations.compilations()
    assert len({each.name for each in found}) == len(found)
    for each in found:
        assert sorted([*each.signature, *each.constants]) == sorted(each.kernel.arg_names), each.name


@pytest.fixture
def rows_of_the_ledger() -> dict[tuple[str, int], ledger.Row]:
    """By configuration and architecture; none unless the ledger is of this Triton and up to date."""
    found = ledger.read()
    if found.versions.get("triton") != ledger.compilers()["triton"]:
        return {}
    done = in_a_process_of_its_own(ledger.__file__, "--most=0")
    return {} if done.returncode else {(row.unit, row.sm): row for row in found.rows if row.compiler == "triton"}


@pytest.mark.slow
def test_configurations_keep_their_limits(rows_of_the_ledger):
    """All that are in the ledger, and a sample is compiled; without --sample the command compiles each."""
    compilations, size = configurations.compilations(), 6 if rows_of_the_ledger else 60
    done, found = compile_in_a_process_of_its_own(f"--sample={size}")
    assert done.returncode == 0, done.stderr
    assert len(found) == min(size, len(compilations))
    assert {each["name"] for each in found} <= {each.name for each in compilations}
    assert all(each["local_memory"] == 0 and each["programs_per_sm"] >= 1 for each in found)
    if not rows_of_the_ledger:
        return
    for each in found:
        row = rows_of_the_ledger[each["name"], each["architecture"]]
        same = {"spilled": each["local_memory"], "shared": each["shared_memory"]}
        assert row.numbers == {name: same.get(name, each.get(name)) for name in row.numbers}, each["name"]
    for compilation in compilations:
        for architecture in compilation.architectures:
            row = rows_of_the_ledger[compilation.name, architecture]
            assert (row.spilled, row.local_accesses) == (0, 0), row
            assert row.registers <= compilation.registers, row
            assert row.shared <= compilation.shared_memory, row


def test_a_sample_comes_from_everywhere_and_takes_architectures_in_turns():
    assert len(ahead_of_time.jobs("sample_kernels", None, "")) == 7
    sample = ahead_of_time.jobs("sample_kernels", 5, "")
    assert [(job.index, job.architecture) for job in sample] == [(0, 80), (1, 90), (2, 80)]
    assert len(ahead_of_time.jobs("sample_kernels", 1, "")) == 1
    assert ahead_of_time.jobs("sample_kernels", None, "32 registers")[0].index == 1


@pytest.mark.slow
def test_resources_are_reported_for_every_architecture_and_a_broken_limit_is_an_error():
    done, found = compile_in_a_process_of_its_own("--module=sample_kernels")
    assert done.returncode == 1
    assert [each["architecture"] for each in found] == [80, 90, 100, 80, 90, 100, 80]
    for each in found:
        assert each["matrix_instructions"] > 0
        assert each["wide_loads"] == each["loads"] > 0
        assert each["wide_stores"] == each["stores"] > 0
        assert each["programs_per_sm"] >= 4
    *found, spilling = found
    for each in found:
        within = each["name"] == "product"
        assert each["broken"] == ([] if within else [f"{each['registers']} registers of 32"])
    memory, accesses = spilling["broken"]
    assert memory == f"{spilling['local_memory']} bytes of spilled registers"
    assert accesses.endswith(" accesses of local memory")
    assert "product in 32 registers" in done.stderr
    assert "product that spills" in done.stderr
    assert "all 7 keep" not in done.stderr


def test_nothing_to_compile_and_the_interpreter_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        ahead_of_time.main([])
    assert "unset it" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        ahead_of_time.main(["--only=no such kernel"])
    assert "configurations has no compilations named *no such kernel*" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("registers", "shared_memory", "num_warps", "architecture", "programs"),
    [
        (32, 0, 4, 90, 16),  # 64 warps
        (255, 0, 4, 90, 2),  # 65536 registers, 256 for each of 128 threads
        (128, 0, 8, 80, 2),
        (64, 100_000, 4, 90, 2),  # 228 KiB
        (64, 100_000, 4, 80, 1),  # 164 KiB
        (16, 0, 1, 90, 32),  # no more than 32 programs
    ],
)
def test_programs_per_multiprocessor(registers, shared_memory, num_warps, architecture, programs):
    assert ahead_of_time.programs_per_sm(registers, shared_memory, num_warps, architecture) == programs
