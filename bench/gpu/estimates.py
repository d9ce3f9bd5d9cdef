"""How long a launch should take on an H100, read off its machine code: for where none is at hand to measure it.

The larger of two times. Memory: the work's bytes at the bandwidth of a large copy, as if nothing lay in a cache. Pipes:
the busiest pipe of a multiprocessor's quarter at 1.83 GHz, with programs dealt out evenly, every branch forwards not
taken, and every loop run as often as the launch says. Neither includes launching (about 2 us outside a graph), of
latency that too few warps leave exposed, or of bank conflicts: a measurement below the estimate means that these rules
are wrong, and one far above it that a kernel waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import machine_code
import roofline

CLOCK = 1.83e9  # Hz
MULTIPROCESSORS, QUARTERS = 132, 4


@dataclass(frozen=True)
class Launch:
    """A launch to estimate: which compilation, how many programs, how often its loops run, and its work."""

    title: str
    compilation: str  # its name
    programs: int
    work: roofline.Work
    trips: tuple[int, ...] = ()  # as for `machine_code.executed`


@dataclass(frozen=True)
class Estimate:
    launch: Launch
    memory: float  # seconds
    pipe: str  # the busiest
    busy: float  # seconds

    @property
    def seconds(self) -> float:
        return max(self.memory, self.busy)


def estimate(launch: Launch, num_warps: int, sass: str) -> Estimate:
    """From sm_90 machine code, as `ahead_of_time.compile_for` gives it."""
    instructions, memory = machine_code.parse(sass), launch.work.bytes / roofline.H100.bandwidth
    if (loops := len(machine_code.loops(instructions))) != len(launch.trips):  # another Triton may unroll one
        return Estimate(launch, memory, f"unknown: {loops} loops instead of {len(launch.trips)}", 0.0)
    cycles = machine_code.busy_cycles(machine_code.executed(instructions, launch.trips))
    pipe = max(cycles, key=cycles.__getitem__)
    rounds = -(-launch.programs // MULTIPROCESSORS)
    return Estimate(launch, memory, pipe, cycles[pipe] * num_warps / QUARTERS * rounds / CLOCK)


def _launches() -> list[Launch]:
    """Those of the encoder's ops at BERT-base's sizes, in bf16 and with dropout."""
    rows, hidden, inner, heads, head_dim = 8192, 768, 3072, 12, 64
    found = []

    def add(title: str, compilation: str, programs: int, work: roofline.Work, *trips: int) -> None:
        found.append(Launch(title, compilation, programs, work, trips))

    # 4 heads a program; loops over blocks of random words, over parts of a tile (1), over heads, over blocks of keys
    for kernel, shape, count, length, tiles, blocks, *trips in (
        ("forward whole", "32 queries, 32 keys, 4 heads, 4 warps, 3 stages", 96, 28, ", tiles", 1, 1, 4),
        ("forward blocks", "64 queries, 64 keys, 4 heads, 4 warps, 2 stages", 64, 128, ", tiles", 2, 2, 1, 4, 2),
        ("forward blocks", "128 queries, 64 keys, 4 heads, 8 warps, 2 stages", 16, 512, "", 4, 8, 4, 8),
        ("backward whole", "32 queries, 32 keys, 4 heads, 4 warps, 1 stages", 96, 28, ", tiles", 1, 1, 4),
        ("backward whole", "32 queries, 128 keys, 4 heads, 8 warps, 1 stages", 64, 128, ", tiles", 1, 4, 1, 4, 4),
        ("backward queries", "128 queries, 64 keys, 4 heads, 8 warps, 2 stages", 16, 512, "", 4, 8, 4, 8),
        ("backward keys", "64 queries, 128 keys, 4 heads, 8 warps, 1 stages", 16, 512, "", 4, 8, 4, 8),
    ):
        work = roofline.attention([length] * count, heads, head_dim, backward="backward" in kernel)
        name = f"attention {kernel}, bf16, head dim {head_dim}, {shape}, dropout{tiles}"
        add(f"attention {kernel}, {count} x {length}", name, count * blocks * heads // 4, work, *trips)

    norm, columns = f"{rows} x {hidden}", f"bf16, {hidden} columns, dropout"
    add(
        f"layer norm forward, {norm}",
        f"layer norm forward, {columns}",
        rows // 4,
        roofline.layer_norm(rows, hidden, backward=False),
    )
    add(
        f"layer norm backward, {norm}",
        f"layer norm backward, {columns}",
        rows // 32,
        roofline.layer_norm(rows, hidden, backward=True),
        8,
    )
    bands = inner // 256
    add(
        f"GELU forward, {rows} x {inner}",
        f"GELU forward, bf16, {inner} columns",
        rows // 8 * bands,
        roofline.gelu(rows, inner, backward=False),
    )
    add(
        f"GELU backward, {rows} x {inner}",
        f"GELU backward, bf16, {inner} columns",
        -(-rows // 152) * bands,
        roofline.gelu(rows, inner, backward=True),
        19,
    )
    return found


LAUNCHES = _launches()


def table(found: Sequence[Estimate], warps_per_sm: Sequence[int]) -> str:
    """In Markdown, microseconds; and how many of the 64 warps that a multiprocessor holds there are."""
    lines = ["| launch | memory | busiest pipe | | estimate | warps |", "|---|--:|---|--:|--:|--:|"]
    for each, warps in zip(found, warps_per_sm, strict=True):
        memory, busy, seconds = (f"{1e6 * time:.1f}" for time in (each.memory, each.busy, each.seconds))
        lines.append(f"| {each.launch.title} | {memory} | {each.pipe} | {busy} | {seconds} | {warps} |")
    return "\n".join(lines)
