"""Every shipped configuration of the Triton kernels compiles for every architecture and keeps its limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minbert.kernels import roofline
from minbert.kernels.triton import ahead, estimate, sass

HOPPER = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000e620000000800 */
        /*0010*/               @P0 LDG.E.128 R4, desc[UR4][R2.64] ;            /* 0x0 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   FFMA R1, R2, R3, R4 ;
        /*0040*/              @!P1 BRA 0x20 ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   RET.REL.NODEC R2 0x0 ;
        /*00a0*/                   BRA 0xa0;
"""


def compile_in_a_process_of_its_own(*options: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """The interpreter, which these tests run under, compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = Path(os.environ["MINBERT_CACHE"]) / "ahead.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "minbert.kernels.triton.ahead", "--json", str(report), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    return done, json.loads(report.read_text()) if report.exists() else []


@pytest.mark.slow
def test_configurations_keep_their_limits():
    """A sample of them; without --sample the command compiles each for all architectures."""
    known = [each for module in ahead.modules() for each in ahead.compilations_of(module)]
    names = [each.name for each in known]
    assert len(set(names)) == len(names)
    if not names:
        pytest.skip("no module of kernels has compilations")
    done, found = compile_in_a_process_of_its_own("--sample=60")
    assert done.returncode == 0, done.stderr
    assert len(found) == min(60, len(names))
    assert {each["name"] for each in found} <= set(names)
    assert all(each["local_memory"] == 0 and each["programs_per_sm"] >= 1 for each in found)


def test_a_sample_comes_from_everywhere_and_takes_architectures_in_turns():
    assert len(ahead.jobs("samples", None, "")) == 7
    sample = ahead.jobs("samples", 5, "")
    assert [(job.index, job.architecture) for job in sample] == [(0, 80), (1, 90), (2, 80)]
    assert len(ahead.jobs("samples", 1, "")) == 1
    assert ahead.jobs("samples", None, "32 registers")[0].index == 1


@pytest.mark.slow
def test_resources_are_told_for_every_architecture_and_a_broken_limit_is_an_error():
    done, found = compile_in_a_process_of_its_own("--package=samples")
    assert done.returncode == 1
    assert [each["architecture"] for each in found] == [80, 90, 100, 80, 90, 100, 80]
    for each in found:
        assert each["matrix_instructions"] > 0
        assert each["wide_accesses"] == each["accesses"] > 0
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
        ahead.main([])
    assert "unset it" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        ahead.main(["--only=no such kernel"])
    assert "has compilations named *no such kernel*" in capsys.readouterr().err


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
    assert ahead.programs_per_sm(registers, shared_memory, num_warps, architecture) == programs


def test_machine_code_is_read_up_to_its_last_exit_and_loops_count_as_often_as_they_run():
    instructions = sass.parse(HOPPER)
    assert sass.loops(instructions) == [(0x20, 0x40)]
    counts = sass.executed(instructions, trips=[5])
    assert counts["HGMMA.64x64x16.F32.BF16"] == counts["FFMA"] == 5
    assert counts["LDG.E.128"] == counts["EXIT"] == 1
    assert "RET.REL.NODEC" not in counts
    assert sass.matrix_instructions(counts) == 5
    assert sass.global_accesses(counts) == (1, 2)
    assert sass.local_accesses(counts) == 1
    assert sass.busy_cycles(counts)["matrix"] == 5 * 32  # 64 x 64 x 16 products for four quarters of 512 a cycle


def test_an_estimate_is_the_larger_of_memory_and_the_busiest_pipe():
    launch = estimate.Launch("a launch", "product", programs=133, work=roofline.Work(3_000_000), trips=(100,))
    found = estimate.estimate(launch, 4, HOPPER)
    assert found.memory == pytest.approx(1e-6)
    assert (found.pipe, found.seconds) == ("matrix", pytest.approx(2 * 100 * 32 / estimate.CLOCK))
    assert "| a launch | 1.0 | matrix | 3.5 | 3.5 | 8 |" in estimate.table([found], [8])
    unknown = estimate.estimate(replace(launch, trips=()), 4, HOPPER)
    assert (unknown.pipe, unknown.seconds) == ("unknown: 1 loops instead of 0", pytest.approx(1e-6))
