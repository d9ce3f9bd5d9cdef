"""What the benchmarks share: interleaved races in one process, their table, and their record in bench/results.

pytest bench/ --benchmark-only                      the table
pytest bench/ --benchmark-only --quick              in minutes: fewer rounds and smaller work
pytest bench/ --benchmark-only --minbert-results    and a JSON file with machine, versions and commit
pytest bench/ --benchmark-only --minbert-record=FILE    the same in FILE, written again after each benchmark
MINBERT_TEST_DATA=DIR pytest bench/ ...             batches drawn from the course's files, in place of drawn lengths
MINBERT_BENCH_SMOKE=1 pytest bench/ --benchmark-only    every benchmark once on small data, to see that it runs
pytest bench/bench_gpu_*.py --benchmark-only        those of GPUs; MINBERT_BENCH_DRY_RUN=1: small data, on the CPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu_races import any_gpu, device, gpu_race, gpu_table, reach, step_race  # noqa: F401  fixtures of this conftest
from records import machine, write_record
from session import FOUND, SMOKE, Found, Race

from minbert.device import keep_freed_memory
from minbert.kernels import set_matmul

ROUNDS = 1 if SMOKE else 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minbert-results", action="store_true", help="write the results to bench/results as JSON")
    parser.addoption("--minbert-record", type=Path, help="write them to this file, again after each benchmark")
    parser.addoption("--quick", action="store_true", help="fewer rounds and smaller work: minutes for all benchmarks")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = Found(config.getoption("--minbert-record"))
    keep_freed_memory()
    set_matmul("auto")


@pytest.fixture(autouse=True)
def _recorded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever ends the session later, the record has what this benchmark found."""
    yield
    request.config.stash[FOUND].write()


@pytest.fixture
def smoke() -> bool:
    """Whether to use small data: MINBERT_BENCH_SMOKE=1."""
    return SMOKE


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether to do with less work: --quick, or small data."""
    return SMOKE or request.config.getoption("--quick")


@pytest.fixture
def profiles(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    """Case -> component -> seconds, to stand beside the results."""
    return request.config.stash[FOUND].profiles


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> dict[str, dict[str, int]]:
    """Case -> who -> peak bytes, to stand beside the results."""
    return request.config.stash[FOUND].peak_bytes


@pytest.fixture
def race(benchmark, quick: bool, request: pytest.FixtureRequest) -> Callable[..., dict[str, float]]:
    """`race(case, {name: function, ...}, bytes_moved={name: ...}, operations={name: ...}, items=...)`: median seconds.

    Each round calls every function once, so that all meet the same state of the machine; the first name is ours and
    the row of pytest-benchmark's own table. `bytes_moved` adds the bandwidth; a function called "copy" makes it a
    share of the machine's copy bandwidth. `operations` (floating-point additions and multiplications) adds GFLOP/s, and
    `items` (such as the sentences that each function works on) how many a second. `pause`: as for `Race`.
    """

    def run(
        case: str,
        functions: Mapping[str, Callable[[], object]],
        bytes_moved: Mapping[str, int] | None = None,
        operations: Mapping[str, int] | None = None,
        items: int | None = None,
        pause: float = 0.0,
    ) -> dict[str, float]:
        rounds = min(ROUNDS, 3) if quick else ROUNDS
        turns, (ours, *others) = Race(functions, pause), functions
        turns.warm_up()
        benchmark.pedantic(turns.time, args=(ours,), setup=lambda: turns.time(*others), rounds=rounds)
        medians = turns.medians
        moved = bytes_moved or {}
        copy = moved["copy"] / medians["copy"] if "copy" in moved else None
        for name, median in medians.items():
            bandwidth = moved[name] / median if name in moved else None
            request.config.stash[FOUND].rows.append(
                {
                    "benchmark": request.node.name,
                    "case": case,
                    "name": name,
                    "seconds": median,
                    "ratio": median / medians[ours],
                    "bytes_per_second": bandwidth,
                    "share_of_copy": bandwidth / copy if bandwidth and copy else None,
                    "operations_per_second": operations[name] / median if operations and name in operations else None,
                    "items_per_second": items / median if items else None,
                    "rounds": rounds,
                }
            )
        return medians

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(case, name, seconds, ratio, **more)`: a row that something else has timed."""
    empty = dict.fromkeys(("bytes_per_second", "share_of_copy", "operations_per_second"))

    def add(case: str, name: str, seconds: float, ratio: float, **more: object) -> None:
        row = {"benchmark": request.node.name, "case": case, "name": name, "seconds": seconds, "ratio": ratio}
        request.config.stash[FOUND].rows.append({**row, **empty, **more})

    return add


# What is written -----------------------------------------------------------------------------------------------------


def _cpu_table(terminalreporter: pytest.TerminalReporter, rows: Sequence[dict[str, Any]]) -> None:
    terminalreporter.line(
        f"{'case':<42} {'who':<30} {'median':>11} {'ratio':>8} {'GB/s':>7} {'of copy':>8} {'GFLOP/s':>8} {'items/s':>8}"
    )
    for row in rows:
        items = f"{row['items_per_second']:8.0f}" if row.get("items_per_second") else ""
        bandwidth = f"{row['bytes_per_second'] / 1e9:7.1f}" if row["bytes_per_second"] else ""
        share = f"{row['share_of_copy']:8.0%}" if row["share_of_copy"] else ""
        speed = f"{row['operations_per_second'] / 1e9:8.0f}" if row["operations_per_second"] else ""
        terminalreporter.line(
            f"{row['case']:<42} {row['name']:<30} {row['seconds'] * 1e3:8.2f} ms {row['ratio']:7.1f}x"
            f" {bandwidth:>7} {share:>8} {speed:>8} {items:>8}"
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[FOUND]
    if not found.rows and not found.peak_bytes:
        return
    made_on = machine()
    terminalreporter.section("minbert against its peers")
    terminalreporter.line(", ".join(f"{key} {value}" for key, value in made_on.items()))
    if on_cpu := [row for row in found.rows if "timer" not in row]:
        _cpu_table(terminalreporter, on_cpu)
    for case, components in found.profiles.items():
        total = sum(components.values())
        shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in components.items())
        terminalreporter.line(f"{case} by component: {shares}")
    for case, peaks in found.peak_bytes.items():
        for who, size in peaks.items():
            terminalreporter.line(f"{case:<42} {who:<30} {size / 2**20:8.0f} MiB at its peak")
    for line in gpu_table(found):
        terminalreporter.line(line)
    if config.getoption("--minbert-results"):
        more = {"ceilings": found.ceilings} if found.ceilings else {}
        path = write_record(found.rows, made_on=made_on, profiles=found.profiles, peak_bytes=found.peak_bytes, **more)
        terminalreporter.line(f"written: {path}")
