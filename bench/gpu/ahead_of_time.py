"""Compiles every configuration of the Triton kernels for every architecture without a GPU, and checks its limits.

python bench/gpu/ahead_of_time.py                 all of them, in a table; exit code 1 if a limit is broken
python bench/gpu/ahead_of_time.py --sample 60     at most 60 of them, evenly spread
python bench/gpu/ahead_of_time.py --estimates     how long BERT-base's launches should take on an H100
python bench/gpu/ahead_of_time.py --json FILE     the same as JSON; --text DIR writes PTX and machine code
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from operator import methodcaller
from pathlib import Path
from typing import Any

import estimates
import machine_code
from configurations import Compilation


@dataclass(frozen=True)
class Resources:
    """What one compilation takes on one architecture, and what it executes."""

    name: str
    kernel: str
    architecture: int
    num_warps: int
    registers: int  # a thread, 4 bytes each
    local_memory: int  # bytes a thread: spilled registers
    shared_memory: int  # bytes a program
    programs_per_sm: int  # at once on a multiprocessor
    code: machine_code.Summary
    broken: tuple[str, ...]  # the limits that it does not keep
    ptx: str = field(repr=False)
    sass: str = field(repr=False)

    @property
    def warps_per_sm(self) -> int:
        return self.programs_per_sm * self.num_warps

    @property
    def matrix_instructions(self) -> int:
        return self.code.matrix_instructions

    @property
    def wide_accesses(self) -> int:
        """Of global memory, 16 bytes a thread or more."""
        return self.code.wide_loads + self.code.wide_stores

    @property
    def accesses(self) -> int:
        return self.code.loads + self.code.stores

    def to_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in asdict(self).items() if name not in ("code", "ptx", "sass")}
        return {**fields, **self.code._asdict()}


def programs_per_sm(registers: int, shared_memory: int, num_warps: int, architecture: int) -> int:
    """How many programs a multiprocessor holds at once: CUDA's occupancy rules for sm_80, sm_90 and sm_100."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // 4 // registers_per_warp * 4 // num_warps  # each quarter has its own
    reserved = -(-(shared_memory + 1024) // 128) * 128  # the system keeps 1 KiB for each program
    by_memory = (164 if architecture < 90 else 228) * 1024 // reserved
    return min(32, 64 // num_warps, by_registers, by_memory)


def compile_for(compilation: Compilation, architecture: int) -> Resources:
    """Compile for one architecture (80, 90, 100); no GPU is needed, and Triton's cache keeps the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = compilation.kernel.arg_names
    source = ASTSource(
        compilation.kernel,
        {**compilation.signature, **dict.fromkeys(compilation.constants, "constexpr")},
        dict(compilation.constants),
        {(names.index(name),): [["tt.divisibility", 16]] for name in compilation.divisible},
    )
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages, **compilation.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    text = machine_code.disassemble(compiled.asm["cubin"])
    usage = machine_code.resources(text)
    code = machine_code.summary(machine_code.executed(machine_code.parse(text)))
    registers, local_memory, shared_memory = usage["REG"], usage["STACK"], compiled.metadata.shared
    limits = {
        f"{registers} registers of {compilation.registers}": registers > compilation.registers,
        f"{local_memory} bytes of spilled registers": local_memory > 0,
        f"{code.local_accesses} accesses of local memory": code.local_accesses > 0,
        f"{shared_memory} bytes of shared memory of {compilation.shared_memory}": shared_memory
        > compilation.shared_memory,
    }
    return Resources(
        compilation.name,
        compiled.metadata.name,
        architecture,
        compilation.num_warps,
        registers,
        local_memory,
        shared_memory,
        programs_per_sm(registers, shared_memory, compilation.num_warps, architecture),
        code,
        tuple(limit for limit, is_broken in limits.items() if is_broken),
        compiled.asm["ptx"],
        text,
    )


# All of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One compilation for one architecture, by names and numbers that another process can look up."""

    module: str
    index: int
    name: str
    architecture: int

    def run(self) -> Resources:
        return compile_for(importlib.import_module(self.module).compilations()[self.index], self.architecture)


def jobs(module: str, sample: int | None, only: str) -> list[Job]:
    """Every configuration whose name contains `only`, for all its architectures.

    Args:
        module: the name of the module whose `compilations()` lists the configurations.
        sample: how many at most; then each configuration is compiled for one of its architectures, in turns.
    """
    found: list[Job] = []
    for index, compilation in enumerate(importlib.import_module(module).compilations()):
        if only in compilation.name:
            chosen = compilation.architectures
            chosen = (chosen[len(found) % len(chosen)],) if sample else chosen
            found += [Job(module, index, compilation.name, architecture) for architecture in chosen]
    if sample and sample < len(found):
        found = [found[i * len(found) // sample] for i in range(sample)]
    return found


def compile_all(work: Sequence[Any], processes: int) -> Iterator[Any]:
    """What `run` of each returns, in the order of `work`: in parallel processes of low priority."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=os.nice, initargs=(10,)) as pool:
        yield from pool.map(methodcaller("run"), work)


COLUMNS = (
    ("arch", "architecture"),
    ("registers", "registers"),
    ("spilled", "local_memory"),
    ("shared", "shared_memory"),
    ("warps", "num_warps"),
    ("programs/SM", "programs_per_sm"),
    ("matrix", "matrix_instructions"),
    ("16-byte", "wide_accesses"),
    ("of accesses", "accesses"),
)


def table(found: Sequence[Resources], markdown: bool) -> str:
    """One line a compilation."""
    width = max([len("kernel"), *(len(each.name) for each in found)])
    rows = [["kernel", *(title for title, _ in COLUMNS)]]
    rows += [[each.name, *(str(getattr(each, name)) for _, name in COLUMNS)] for each in found]
    if markdown:
        rule = "|".join(["---", *["--:"] * len(COLUMNS)])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
    sizes = [len(title) + 2 for title, _ in COLUMNS]
    return "\n".join(
        row[0].ljust(width) + "".join(cell.rjust(size) for cell, size in zip(row[1:], sizes, strict=True))
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/gpu/ahead_of_time.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sample", type=int, help="so many at most, each for one architecture, in turns")
    parser.add_argument("--estimates", action="store_true", help="only what they need, and nothing else printed")
    parser.add_argument("--only", default="", help="configurations whose names contain this")
    parser.add_argument("--module", default="configurations", help="whose compilations() to compile")
    parser.add_argument("--processes", type=int, default=max(1, min(4, len(os.sched_getaffinity(0)))))
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--text", type=Path, help="write PTX and machine code to this directory")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 makes Triton interpret kernels; unset it to compile them")

    work = jobs(options.module, options.sample, options.only)
    if options.estimates:
        wanted = {launch.compilation for launch in estimates.LAUNCHES}
        work = [job for job in work if job.architecture == 90 and job.name in wanted]
    if not work:
        parser.error(f"{options.module} has no compilations named *{options.only}*")
    started, found = time.monotonic(), []
    for resources in compile_all(work, options.processes):
        found.append(resources)
        line = f"{len(found)}/{len(work)} compiled, {time.monotonic() - started:.0f} s: {resources.name}"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif len(found) % 10 == 0 or len(found) == len(work):
            print(line, file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if not options.estimates:
        print(table(found, options.markdown))
    if hopper := estimate_table(found):
        print(f"\nOn an H100, in microseconds:\n\n{hopper}")
    if options.text:
        write_text(options.text, found)
    if options.json:
        content = json.dumps([each.to_json() for each in found], indent=1)
        options.json.write_text(content + "\n", encoding="utf-8")
    broken = [f"sm_{each.architecture} {each.name}: {', '.join(each.broken)}" for each in found if each.broken]
    print("\n".join(broken) if broken else f"all {len(found)} keep their limits", file=sys.stderr)
    return 1 if broken else 0


def estimate_table(found: Sequence[Resources]) -> str:
    """A table of the launches whose compilation for Hopper is among those found."""
    hopper = {each.name: each for each in found if each.architecture == 90}
    launches = [(launch, hopper[launch.compilation]) for launch in estimates.LAUNCHES if launch.compilation in hopper]
    if not launches:
        return ""
    times = [estimates.estimate(launch, each.num_warps, each.sass) for launch, each in launches]
    return estimates.table(times, [each.warps_per_sm for _, each in launches])


def write_text(directory: Path, found: Sequence[Resources]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for each in found:
        stem = re.sub(r"[^a-z0-9]+", "-", f"{each.name} sm {each.architecture}".lower())
        (directory / f"{stem}.ptx").write_text(each.ptx, encoding="utf-8")
        (directory / f"{stem}.sass").write_text(each.sass, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(importlib.import_module("ahead_of_time").main())  # not __main__'s: other processes unpickle its classes
