"""The fixtures of benchmarks on GPUs, and their table."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict

import pytest
import torch
from roofline import Ceilings, Work
from session import DRY_RUN, FOUND, SMOKE, Found
from timing import StartStep, Timing, ceilings, measure, measure_steps


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
    request.config.stash[FOUND].ceilings |= asdict(found)
    return found


@pytest.fixture
def gpu_race(benchmark, device: torch.device, reach: Ceilings, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`gpu_race(case, {name: function of i, ...}, work, sets=..., goal=...)`: the first name is ours.

    Each function does its work on input set i of `sets`. `work` gives the floor; `goal` is the time that we promise on
    an H100, in seconds. `waiting` names functions that wait for the device, which no graph can record.
    """

    def run(
        case: str,
        functions: Mapping[str, Callable[..., object]],
        work: Work,
        *,
        goal: float | None = None,
        sets: int = 1,
        waiting: Collection[str] = (),
    ) -> None:
        rounds = 2 if SMOKE else 21

        def all_of_them() -> dict[str, Timing]:
            return {
                name: measure(function, sets, device, graph=name not in waiting, rounds=rounds)
                for name, function in functions.items()
            }

        found = benchmark.pedantic(all_of_them, rounds=1)
        ours = next(iter(found.values()))
        for name, timing in found.items():
            bandwidth = work.bytes / timing.seconds
            request.config.stash[FOUND].rows.append(
                {
                    "benchmark": request.node.name,
                    "case": case,
                    "name": name,
                    "seconds": timing.seconds,
                    "ratio": timing.seconds / ours.seconds,
                    "bytes_per_second": bandwidth,
                    "share_of_copy": bandwidth / reach.bandwidth,
                    "operations_per_second": work.operations / timing.seconds if work.operations else None,
                    "rounds": rounds,
                    "spread": timing.spread,
                    "timer": timing.timer,
                    "floor": work.floor(reach),
                    "goal": goal if timing is ours else None,
                }
            )

    return run


@pytest.fixture
def step_race(benchmark, any_gpu: torch.device, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`step_race(case, {name: build, ...}, examples=..., batches=..., floor=..., goal=...)`: the first name is ours.

    Args:
        builds: by name, what builds a training step (`timing.StartStep`). One that raises an error is left out, unless
            it is the first.
        examples: of a step.
        batches: that steps take in turns.
        floor, goal: seconds.

    One contender is built, timed and freed after the other, and the record has each as soon as it is timed. All run on
    the default stream, as training does.
    """
    found: Found = request.config.stash[FOUND]
    on_gpu = any_gpu.type == "cuda"

    def time_one(case: str, name: str, build: Callable[[], StartStep], batches: int, row: dict[str, object]) -> float:
        if on_gpu:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        warm_up = 2 * batches + 2 if on_gpu else 1  # a CUDA graph is captured the second time that a shape comes
        timing = measure_steps(build(), any_gpu, warm_up=warm_up, steps=(1 if SMOKE else 3) * batches)
        if on_gpu:
            found.peak_bytes.setdefault(case, {})[name] = torch.cuda.max_memory_allocated() - before
        found.rows.append(
            {
                "benchmark": request.node.name,
                "case": case,
                "name": name,
                "seconds": timing.seconds,
                **dict.fromkeys(("bytes_per_second", "share_of_copy", "operations_per_second")),
                "rounds": timing.steps,
                "spread": timing.spread,
                "timer": "steps",
                "host_seconds": timing.host,
                **row,
            }
        )
        return timing.seconds

    def run(
        case: str,
        builds: Mapping[str, Callable[[], StartStep]],
        *,
        examples: int,
        batches: int,
        floor: float,
        goal: float | None,
    ) -> None:
        def all_of_them() -> None:
            first = None
            for name, build in builds.items():
                row = {"floor": floor, "goal": goal if first is None else None}
                try:
                    seconds = time_one(case, name, build, batches, row)
                except Exception as error:
                    if first is None:
                        raise
                    found.leave_out(case, name, error)
                else:
                    first = first or seconds
                    found.rows[-1] |= {"ratio": seconds / first, "items_per_second": examples / seconds}
                found.write()

        benchmark.pedantic(all_of_them, rounds=1)

    return run


def gpu_table(found: Found) -> Iterator[str]:
    """The lines of what was timed on a GPU."""
    rows = [row for row in found.rows if "timer" in row]
    if rows:
        yield ", ".join(f"{name} {value / 1e12:.2f} T/s" for name, value in found.ceilings.items())
        yield (
            f"{'case':<44} {'who':<34} {'time':>10} {'floor':>9} {'x floor':>8} {'goal':>6} {'x ours':>7}  timer"
            f" {'host':>9} {'items/s':>8}"
        )
    for row in rows:
        least = f"{1e6 * row['floor']:9.1f} {row['seconds'] / row['floor']:7.2f}x" if row["floor"] else ""
        goal = f"{1e6 * row['goal']:6.0f}" if row["goal"] else ""
        host = f" {1e6 * row['host_seconds']:6.0f} us {row['items_per_second']:8.0f}" if "host_seconds" in row else ""
        yield (
            f"{row['case']:<44} {row['name']:<34} {1e6 * row['seconds']:7.1f} us {least:>18} {goal:>6}"
            f" {row['ratio']:6.1f}x  {row['timer']:<6}{host}"
        ).rstrip()
    reasons = Counter((name, why) for who in found.left_out.values() for name, why in who.items())
    for (name, why), cases in reasons.items():
        yield f"left out of {cases} cases: {name}, {why}"
