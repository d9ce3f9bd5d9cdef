"""Times GPU work: CUDA graphs where they can be captured, over inputs that rotate so that none lies in the L2 cache."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from roofline import Ceilings

from minbert.training.cuda_graphs import renew_generator

Numbered = Callable[[int], object]  # does its work on input set i
StartStep = Callable[[], Callable[[], object]]  # begins a training step, and returns what reads its results
CALLS, ROUNDS = 48, 21  # in one replay of a graph; replays, of which the median counts
HOST_STEPS = 8  # of which the host's own time is measured
_failed: list[torch.cuda.CUDAGraph] = []


@dataclass(frozen=True)
class Timing:
    """The median time of a call."""

    seconds: float
    spread: float  # of the rounds: half of them lie within so many seconds
    timer: str  # "graph", "events" (calls enqueued one by one), "steps" (of training) or "wall" (on CPUs)


@dataclass(frozen=True)
class StepTiming:
    """The median times of a training step."""

    seconds: float  # from one step to the next
    spread: float  # of the steps: half of them lie within so many seconds
    host: float  # until the call that begins a step returns, where nothing waits for the device
    steps: int


def input_sets(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs, of so many bytes with their outputs, fill the L2 cache three times."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-3 * cache // set_bytes)) if set_bytes < 3 * cache else 1


def measure(function: Numbered, sets: int, device: torch.device, *, graph: bool = True, rounds: int = ROUNDS) -> Timing:
    """Time `function`, called with 0 to sets - 1 in turns, on the current stream.

    The results of the last `sets` calls stay alive, so that outputs rotate as inputs do.
    """
    calls = sets * max(1, CALLS // sets) if sets > 1 else 4
    results: deque[object] = deque(maxlen=sets)

    def all_calls() -> None:
        for i in range(calls):
            results.append(function(i % sets))

    for i in range(sets):
        function(i)  # compiles, and fills the caches of the allocators
    wait(device)
    if device.type != "cuda":
        return _timing(_wall(all_calls, rounds, device), calls, "wall")
    timer, run = "events", all_calls
    if graph and (recorded := _captured(all_calls, device)) is not None:
        timer, run = "graph", recorded.replay
    return _timing(_by_events(run, rounds), calls, timer)


def measure_steps(start: StartStep, device: torch.device, *, warm_up: int, steps: int) -> StepTiming:
    """Time training steps as the training loop takes them: the results of a step are read once the next one is begun.

    The host's own time is measured apart, in steps that begin once the device has done everything before them: then
    nothing in them waits for the device.
    """
    times, pending = [], None
    for _ in range(warm_up + steps):
        began = time.perf_counter()
        read = start()
        if pending is not None:
            pending()
        pending = read
        times.append(time.perf_counter() - began)
    if pending is not None:
        pending()
    host = []
    for _ in range(min(steps, HOST_STEPS)):
        wait(device)
        began = time.perf_counter()
        read = start()
        host.append(time.perf_counter() - began)
        read()
    whole = _timing(times[warm_up:], 1, "steps")
    return StepTiming(whole.seconds, whole.spread, statistics.median(host), steps)


def _captured(run: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """`run` as a graph; None on the default stream, and where it does what a graph cannot record, such as waiting.

    After a failed capture torch's allocator goes on asking the graph for its number, and up to torch 2.11 the
    generator that it used stays unusable.
    """
    if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        return None
    recorded = torch.cuda.CUDAGraph()
    _failed.append(recorded)
    try:
        with torch.cuda.graph(recorded, stream=torch.cuda.current_stream(device)):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        renew_generator(device)
        return None
    _failed.remove(recorded)
    return recorded


def _by_events(run: Callable[[], None], rounds: int) -> list[float]:
    run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def _wall(run: Callable[[], None], rounds: int, device: torch.device) -> list[float]:
    times = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return times


def wait(device: torch.device) -> None:
    """Until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timing(times: list[float], calls: int, timer: str) -> Timing:
    ordered = sorted(times)
    spread = ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]
    return Timing(statistics.median(times) / calls, spread / calls, timer)


def ceilings(device: torch.device, copied: int = 2**30, size: int = 8192) -> Ceilings:
    """What this device reaches: a copy of so many bytes, and a product of bf16 matrices of random numbers."""
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / measure(lambda _: target.copy_(source), 1, device, graph=False).seconds
    x, y = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return Ceilings(bandwidth, 2 * size**3 / measure(lambda _: x @ y, 1, device, graph=False).seconds)
