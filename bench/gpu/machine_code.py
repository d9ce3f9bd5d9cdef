"""Reads machine code as cuobjdump prints it: what a kernel executes, and how long it keeps the pipes of Hopper busy."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_HGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_BRANCH_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")
_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)  # of global memory
_MATRIX = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "DMMA")

# Cycles for which one warp instruction keeps a pipe of its quarter of a core busy: 32 lanes over the lanes per clock
# that NVIDIA's programming guide gives for compute capability 9.0. mma.sync reaches two thirds of wgmma's rate there.
_LOGIC = ("IADD3", "VIADD", "LOP3", "SHF", "LEA", "PRMT", "SGXT", "MOV", "SEL", "ISETP", "IMNMX", "VIMNMX", "PLOP3")
_FLOAT_LOGIC = ("FSETP", "FSEL", "FMNMX", "F2FP", "I2FP")
_MEMORY = ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM", "SHFL", "LDL", "STL", "ATOMS", "ATOMG", "RED")
_PIPES = {
    "fused multiply-add": dict.fromkeys(("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "IMAD"), 1),
    "integer multiply-add": {"IMAD": 2},
    "integer and logic": dict.fromkeys((*_LOGIC, *_FLOAT_LOGIC), 2),
    "special functions": dict.fromkeys(("MUFU", "F2I", "I2F", "F2F", "POPC", "FLO"), 8),
    "float64": dict.fromkeys(("DFMA", "DMUL", "DADD", "DSETP"), 2),
    "memory": dict.fromkeys(_MEMORY, 4),
    "matrix": {"HMMA": 6},
}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its suffixes: "LDG.E.128"
    operands: str

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    def target(self) -> int | None:
        """Where a branch goes."""
        found = _BRANCH_TARGET.search(self.operands.strip()) if self.base == "BRA" else None
        return int(found[1], 16) if found else None


def disassemble(cubin: bytes) -> str:
    """A cubin's resources and instructions as printed by cuobjdump, which Triton installs."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(text: str) -> dict[str, int]:
    """One kernel's REG, STACK and SHARED: registers of a thread, bytes of its stack, bytes of a block."""
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel up to its last exit or way back into a loop; subroutines for rare cases follow."""
    found = [Instruction(int(m[1], 16), m[2], m[3]) for line in text.splitlines() if (m := _INSTRUCTION.match(line))]
    last = max((each.address for each in found if each.base == "EXIT"), default=0)
    ends = [each.address for each in found if (target := each.target()) is not None and target < last]
    return [each for each in found if each.address <= max(last, *ends, 0)]


def loops(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Addresses of the first and last instruction of each loop, in the order of the first."""
    ends: dict[int, int] = {}
    for each in instructions:
        start = each.target()
        if start is not None and start < each.address:
            ends[start] = each.address  # the last branch back to it
    return sorted(ends.items())


def executed(instructions: Sequence[Instruction], trips: Sequence[int] = ()) -> Counter[str]:
    """How often a warp executes each instruction if it takes no branch forwards.

    Args:
        trips: how often each of `loops` runs for one entry into it; once where left out.
    """
    found = list(zip(loops(instructions), trips, strict=False))
    counts: Counter[str] = Counter()
    for instruction in instructions:
        around = [times for (start, end), times in found if start <= instruction.address <= end]
        counts[instruction.name] += math.prod(around)
    return counts


def matrix_instructions(counts: Counter[str]) -> int:
    return sum(n for name, n in counts.items() if name.startswith(_MATRIX))


class Summary(NamedTuple):
    """How many instructions of some kinds a kernel has."""

    instructions: int
    matrix_instructions: int
    loads: int  # of global memory
    wide_loads: int  # of them those of 16 bytes a thread or more
    stores: int
    wide_stores: int
    local_accesses: int  # loads and stores of local memory: spilled registers, and arrays that are indexed at run time


def summary(counts: Counter[str]) -> Summary:
    """Of instructions by name, as `executed` counts them."""

    def number(bases: Sequence[str], *widths: str) -> int:
        wanted = (n for name, n in counts.items() if name.partition(".")[0] in bases and _is_as_wide(name, widths))
        return sum(wanted)

    wide = ("128", "256")
    memory = number(_LOADS), number(_LOADS, *wide), number(_STORES), number(_STORES, *wide)
    return Summary(sum(counts.values()), matrix_instructions(counts), *memory, number(("LDL", "STL")))


def _is_as_wide(name: str, widths: Sequence[str]) -> bool:
    return not widths or not set(widths).isdisjoint(name.split("."))


def busy_cycles(counts: Counter[str]) -> dict[str, float]:
    """By pipe, the cycles for which a warp keeps its quarter of a Hopper core busy; "issue" is one an instruction."""
    cycles = {"issue": float(sum(counts.values()))}
    for pipe, costs in _PIPES.items():
        cycles[pipe] = float(sum(n * _cost(name, costs) for name, n in counts.items()))
    return cycles


def _cost(name: str, costs: dict[str, int]) -> float:
    base = name.partition(".")[0]
    if base == "HGMMA" and "HMMA" in costs and (shape := _HGMMA.match(name)):
        rows, columns, inner = map(int, shape.groups())
        return 2 * rows * columns * inner / 4 / 1024  # four warps share it; 1024 operations a clock in each quarter
    wide = 4 if ".128" in name or ".M88.4" in name else 2 if ".64" in name else 1
    return costs.get(base, 0) * (wide if base.startswith(("LD", "ST")) else 1)
