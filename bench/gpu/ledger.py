"""A ledger of the machine code of every kernel: bench/gpu/ledger.csv, a line for each kernel and architecture.

python bench/gpu/ledger.py                  compile what has changed since it was written, and print the difference
python bench/gpu/ledger.py --write          the same, and write it
python bench/gpu/ledger.py --most 60        compile no more than 60 of what has changed
python bench/gpu/ledger.py --since HEAD~1   print what is different in it from that of a commit, too

A line has a hash of the source that its kernel was compiled from; a kernel with the same one is not compiled again. The
exit code is 1 where the ledger is out of date. Kernels of another compiler than the ledger's are not compared.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ahead_of_time
import configurations
import cuda_kernels
import machine_code
import source_hashes

PATH = Path(__file__).with_name("ledger.csv")
WRITE = "python bench/gpu/ledger.py --write"
SAVE_AFTER = 20  # compilations: so many are lost where --write is stopped


class Row(NamedTuple):
    """The machine code of a kernel for one architecture."""

    compiler: str  # "nvcc" or "triton"
    unit: str  # what is compiled at once: a file of CUDA kernels, or a Triton configuration
    kernel: str
    sm: int
    registers: int  # of a thread, 4 bytes each
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    instructions: int
    matrix_instructions: int
    loads: int  # of global memory, instructions; and of 16 bytes a thread or more
    wide_loads: int
    stores: int
    wide_stores: int
    local_accesses: int
    source: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self[:4]

    @property
    def numbers(self) -> dict[str, int]:
        """What is compared."""
        return dict(zip(self._fields[4:-1], self[4:-1], strict=True))


TEXTS = ("compiler", "unit", "kernel", "source")  # the other fields are numbers
Key = tuple[str, str, int]  # of a unit: compiler, name, architecture


@dataclass(frozen=True)
class Unit:
    """What is compiled at once for one architecture; another process can look it up by its names and numbers."""

    compiler: str
    name: str
    architecture: int
    source: str
    job: ahead_of_time.Job | None = None  # of Triton

    @property
    def key(self) -> Key:
        return self.compiler, self.name, self.architecture

    def run(self) -> list[Row]:
        if self.job is not None:
            found = self.job.run()
            used = found.registers, found.local_memory, found.shared_memory
            return [Row(self.compiler, self.name, found.kernel, self.architecture, *used, *found.code, self.source)]
        rows = []
        for kernel, text in cuda_kernels.compiled(cuda_kernels.CSRC / "cuda" / self.name, self.architecture):
            usage = machine_code.resources(text)
            code = machine_code.summary(machine_code.executed(machine_code.parse(text)))
            used = usage["REG"], usage["STACK"], usage["SHARED"]
            rows.append(Row(self.compiler, self.name, kernel, self.architecture, *used, *code, self.source))
        return rows


def triton_units(module: str = "configurations") -> list[Unit]:
    compilations, units = importlib.import_module(module).compilations(), []
    for job in ahead_of_time.jobs(module, None, ""):
        source = source_hashes.of_triton(compilations[job.index], job.architecture)
        units.append(Unit("triton", job.name, job.architecture, source, job))
    return units


def cuda_units() -> list[Unit]:
    units, architectures = [], cuda_kernels.known(configurations.ARCHITECTURES)
    for path in cuda_kernels.SOURCES:
        source = source_hashes.of_cuda(path, cuda_kernels.CSRC, cuda_kernels.OPTIONS)
        units += [Unit("nvcc", path.name, architecture, source) for architecture in architectures]
    return units


UNITS: dict[str, Callable[[], list[Unit]]] = {"nvcc": cuda_units, "triton": triton_units}


def compilers() -> dict[str, str | None]:
    """The version of each compiler; None where it is not here."""
    import triton
    from triton import knobs

    return {"nvcc": cuda_kernels.version(), "triton": f"{triton.__version__} with ptxas {knobs.nvidia.ptxas.version}"}


# The file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    versions: Mapping[str, str]  # of the compilers
    by_unit: Mapping[Key, list[Row]]

    @property
    def rows(self) -> list[Row]:
        return sorted(row for rows in self.by_unit.values() for row in rows)

    def of(self, unit: Unit) -> list[Row]:
        """The rows of a unit if they were compiled from what it is now, else none."""
        found = self.by_unit.get(unit.key, [])
        return found if all(row.source == unit.source for row in found) else []


def parse(text: str) -> Ledger:
    heading = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    by_unit: dict[Key, list[Row]] = {}
    for record in csv.DictReader(lines):
        row = Row(**{name: value if name in TEXTS else int(value) for name, value in record.items()})
        by_unit.setdefault((row.compiler, row.unit, row.sm), []).append(row)
    return Ledger(dict(line.split(" ", 1) for line in heading[1:]), by_unit)


def read(path: Path = PATH) -> Ledger:
    return parse(path.read_text(encoding="utf-8")) if path.exists() else Ledger({}, {})


def text_of(ledger: Ledger) -> str:
    out = io.StringIO()
    out.write(f"# The machine code of every kernel; {WRITE} writes it\n")
    out.writelines(f"# {name} {version}\n" for name, version in sorted(ledger.versions.items()))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([Row._fields, *ledger.rows])
    return out.getvalue()


def difference(before: Ledger, after: Ledger) -> list[str]:
    """A line for each compiler of another version, and for each kernel that is new, gone or has other numbers."""
    lines = [
        f"{name} {before.versions.get(name, 'without a version')} -> {version}"
        for name, version in after.versions.items()
        if version != before.versions.get(name)
    ]
    old, new = ({row.key: row for row in ledger.rows} for ledger in (before, after))
    for key in sorted(old.keys() | new.keys()):
        compiler, unit, kernel, sm = key
        title, was, now = f"sm_{sm} {f'{unit}: {kernel}' if compiler == 'nvcc' else unit}", old.get(key), new.get(key)
        if was is None or now is None:
            lines.append(f"{title}: {'gone' if now is None else 'new'}")
        elif was.numbers != now.numbers:
            changed = {name: number for name, number in now.numbers.items() if number != was.numbers[name]}
            parts = (f"{name.replace('_', ' ')} {was.numbers[name]} -> {number}" for name, number in changed.items())
            lines.append(f"{title}: {', '.join(parts)}")
    return lines


# Against what is compiled now ------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/gpu/ledger.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="write what was found")
    parser.add_argument("--most", type=int, metavar="N", help="compile at most N kernels, and say how many are left")
    parser.add_argument("--since", metavar="COMMIT", help="print what is different from the ledger of a commit, too")
    parser.add_argument("--processes", type=int, default=max(1, min(4, len(os.sched_getaffinity(0)))))
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 makes Triton interpret kernels; unset it to compile them")
    ledger = read()
    if options.write and options.most is not None:
        parser.error("--write compiles all that has changed; leave --most out")
    if options.since:
        print("\n".join([f"since {options.since}:", *since(options.since, ledger)]))
    return compare(ledger, compilers(), options.processes, PATH if options.write else None, options.most)


def compare(
    ledger: Ledger, versions: Mapping[str, str | None], processes: int, path: Path | None, most: int | None = None
) -> int:
    """Compile what has changed, or `most` units of it; print the difference; write the ledger to `path` if given.

    Returns:
        the exit code.
    """
    taken = dict[str, str]()
    for compiler, version in versions.items():
        known = ledger.versions.get(compiler)
        if version is None:
            print(f"{compiler} is not here: its kernels are not compared")
        elif version != known and path is None:
            written = f"is of {known}" if known else "has none of its kernels"
            print(f"{compiler} is {version}, and the ledger {written}: they are not compared")
        else:
            taken[compiler] = version
    units = [unit for compiler in taken for unit in UNITS[compiler]()]
    of_same_version = {unit.key for unit in units if taken[unit.compiler] == ledger.versions.get(unit.compiler)}
    kept = {key: rows for key, rows in ledger.by_unit.items() if key[0] not in taken or key in of_same_version}
    after = Ledger({**ledger.versions, **taken}, kept)
    stale = [unit for unit in units if not after.of(unit)]
    work = stale[:most]
    for number, (unit, rows) in enumerate(zip(work, ahead_of_time.compile_all(work, processes), strict=True), 1):
        kept[unit.key] = rows
        if number % SAVE_AFTER == 0:
            print(f"{number} of {len(work)} compiled", file=sys.stderr, flush=True)
            if path is not None:
                path.write_text(text_of(after), encoding="utf-8")
    lines = difference(ledger, after)
    lines += [f"{len(stale) - len(work)} more were not compiled"] if len(work) < len(stale) else []
    print("\n".join(lines or ["no kernel has other machine code than in the ledger"]))
    if path is not None:
        path.write_text(text_of(after), encoding="utf-8")
    elif stale or lines:
        print(f"the ledger is out of date; write it anew: {WRITE}", file=sys.stderr)
        return 1
    return 0


def since(commit: str, ledger: Ledger) -> list[str]:
    """What is different from the ledger of a commit."""
    command = ["git", "show", f"{commit}:./{PATH.name}"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=PATH.parent)
    if shown.returncode:
        return ["there is no ledger to compare with"]
    return difference(parse(shown.stdout), ledger) or ["no kernel has other machine code"]


if __name__ == "__main__":
    sys.exit(importlib.import_module("ledger").main())  # not __main__'s: other processes unpickle its classes
