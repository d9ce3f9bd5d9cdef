"""What the benchmarks share: interleaved races in one process, their table, and their record in bench/results.

pytest bench/ --benchmark-only                      the table
pytest bench/ --benchmark-only --quick              in minutes: fewer rounds and smaller work
pytest bench/ --benchmark-only --minbert-results    and a JSON file with machine, versions and commit
MINBERT_TEST_DATA=DIR pytest bench/ ...             batches drawn from the course's files, in place of drawn lengths
MINBERT_BENCH_SMOKE=1 pytest bench/ --benchmark-only    every benchmark once on small data, to see that it runs
pytest bench/bench_gpu_*.py --benchmark-only        those of GPUs; MINBERT_BENCH_DRY_RUN=1: small data, on the CPU
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from records import machine, write_record
from roofline import Ceilings, Work
from timing import Timing, ceilings, measure, measure_wall

from minbert.device import keep_freed_memory
from minbert.kernels import set_matmul

DRY_RUN = os.environ.get("MINBERT_BENCH_DRY_RUN") == "1"
SMOKE = os.environ.get("MINBERT_BENCH_SMOKE") == "1" or DRY_RUN
ROUNDS = 1 if SMOKE else 5
ROWS = pytest.StashKey[list[dict[str, Any]]]()
PROFILES = pytest.StashKey[dict[str, dict[str, float]]]()
MEMORY = pytest.StashKey[dict[str, dict[str, int]]]()
CEILINGS = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minbert-results", action="store_true", help="write the results to bench/results as JSON")
    parser.addoption("--quick", action="store_true", help="fewer rounds and smaller work: minutes for all benchmarks")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[PROFILES] = {}
    config.stash[MEMORY] = {}
    config.stash[CEILINGS] = {}
    keep_freed_memory()
    set_matmul("auto")


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
    return request.config.stash[PROFILES]


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> dict[str, dict[str, int]]:
    """Case -> who -> peak bytes, to stand beside the results."""
    return request.config.stash[MEMORY]


@pytest.fixture
def race(benchmark, quick: bool, request: pytest.FixtureRequest) -> Callable[..., dict[str, float]]:
    """`race(case, {name: function, ...}, bytes_moved={name: ...}, operations={name: ...}, items=...)`: median seconds.

    Each round calls every function once, so that all meet the same state of the machine; the first name is ours and
    the row of pytest-benchmark's own table. `bytes_moved` adds the bandwidth; a function called "copy" makes it a
    share of the machine's copy bandwidth. `operations` (floating-point additions and multiplications) adds GFLOP/s, and
    `items` (such as the sentences that each function works on) how many a second. `pause` seconds pass before each
    call: the threads of the function before, which spin while they wait for more work, have gone to sleep by then.
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
        seconds: dict[str, list[float]] = {name: [] for name in functions}

        def timed(name: str) -> None:
            time.sleep(pause)
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)

        ours, *others = functions
        for function in functions.values():  # warm up: pages, caches, threads
            function()
        benchmark.pedantic(timed, args=(ours,), setup=lambda: [timed(name) for name in others] and None, rounds=rounds)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        moved = bytes_moved or {}
        copy = moved["copy"] / medians["copy"] if "copy" in moved else None
        for name, median in medians.items():
            bandwidth = moved[name] / median if name in moved else None
            request.config.stash[ROWS].append(
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
        request.config.stash[ROWS].append({**row, **empty, **more})

    return add


# On GPUs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def any_gpu() -> torch.device:
    """A GPU; the CPU in a dry run."""
    if not (DRY_RUN or torch.cuda.is_available()):
        pytest.skip("needs a CUDA device; MINBERT_BENCH_DRY_RUN=1 runs it on the CPU, on small data")
    return torch.device("cpu" if DRY_RUN else "cuda")


@pytest.fixture
def device(any_gpu: torch.device) -> Iterator[torch.device]:
    """The GPU, with a stream of its own, on which graphs can be captured."""
    if any_gpu.type == "cpu":
        yield any_gpu
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield any_gpu
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def reach(any_gpu: torch.device, request: pytest.FixtureRequest) -> Ceilings:
    """What the device reaches in a copy and in a product of matrices."""
    found = ceilings(any_gpu, **({"copied": 2**20, "size": 64} if DRY_RUN else {}))
    request.config.stash[CEILINGS] |= asdict(found)
    return found


@pytest.fixture
def gpu_race(benchmark, device: torch.device, reach: Ceilings, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`gpu_race(case, {name: function of i, ...}, work, sets=..., goal=...)`: the first name is ours.

    Each function does its work on input set i of `sets`. `work` gives the floor, which `floor` states where there is
    more than one launch; `goal` is the time that we promise on an H100, in seconds. With `steps`, functions take no
    argument and are timed with the host's work, so many at a time.
    """

    def run(
        case: str,
        functions: Mapping[str, Callable[..., object]],
        work: Work | None = None,
        *,
        floor: float | None = None,
        goal: float | None = None,
        sets: int = 1,
        steps: int = 0,
    ) -> None:
        rounds = 2 if SMOKE else 7 if steps else 21

        def timed(function: Callable[..., object]) -> Timing:
            if steps:
                return measure_wall(function, device, calls=steps, rounds=rounds)
            return measure(function, sets, device, rounds=rounds)

        found = benchmark.pedantic(lambda: {name: timed(f) for name, f in functions.items()}, rounds=1)
        ours = next(iter(found.values()))
        least = work.floor(reach) if work is not None else floor
        for name, timing in found.items():
            own = timing is ours
            bandwidth = work.bytes / timing.seconds if work is not None else None
            request.config.stash[ROWS].append(
                {
                    "benchmark": request.node.name,
                    "case": case,
                    "name": name,
                    "seconds": timing.seconds,
                    "ratio": timing.seconds / ours.seconds,
                    "bytes_per_second": bandwidth,
                    "share_of_copy": bandwidth / reach.bandwidth if bandwidth else None,
                    "operations_per_second": work.operations / timing.seconds if work and work.operations else None,
                    "rounds": rounds,
                    "spread": timing.spread,
                    "timer": timing.timer,
                    "floor": least,
                    "goal": goal if own else None,
                }
            )

    return run


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


def _gpu_table(terminalreporter: pytest.TerminalReporter, rows: Sequence[dict[str, Any]]) -> None:
    terminalreporter.line(
        f"{'case':<44} {'who':<34} {'time':>10} {'floor':>9} {'x floor':>8} {'goal':>6} {'x ours':>7}  timer"
    )
    for row in rows:
        least = f"{1e6 * row['floor']:9.1f} {row['seconds'] / row['floor']:7.2f}x" if row["floor"] else ""
        goal = f"{1e6 * row['goal']:6.0f}" if row["goal"] else ""
        terminalreporter.line(
            f"{row['case']:<44} {row['name']:<34} {1e6 * row['seconds']:7.1f} us {least:>18} {goal:>6}"
            f" {row['ratio']:6.1f}x  {row['timer']}"
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, reached = config.stash[ROWS], config.stash[CEILINGS]
    if not rows and not config.stash[MEMORY]:
        return
    made_on = machine()
    terminalreporter.section("minbert against its peers")
    terminalreporter.line(", ".join(f"{key} {value}" for key, value in made_on.items()))
    if on_cpu := [row for row in rows if "timer" not in row]:
        _cpu_table(terminalreporter, on_cpu)
    for case, components in config.stash[PROFILES].items():
        total = sum(components.values())
        shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in components.items())
        terminalreporter.line(f"{case} by component: {shares}")
    for case, peaks in config.stash[MEMORY].items():
        for who, size in peaks.items():
            terminalreporter.line(f"{case:<42} {who:<30} {size / 2**20:8.0f} MiB at its peak")
    if on_gpu := [row for row in rows if "timer" in row]:
        terminalreporter.line(", ".join(f"{name} {value / 1e12:.2f} T/s" for name, value in reached.items()))
        _gpu_table(terminalreporter, on_gpu)
    if config.getoption("--minbert-results"):
        profiles, peaks = config.stash[PROFILES], config.stash[MEMORY]
        more = {"ceilings": reached} if reached else {}
        path = write_record(rows, made_on=made_on, profiles=profiles, peak_bytes=peaks, **more)
        terminalreporter.line(f"written: {path}")
