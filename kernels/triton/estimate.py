"""How long a launch should take on an H100, read off its machine code: for where none is at hand to measure it.

The larger of two times. Memory: the work's bytes at the bandwidth of a large copy, as if nothing lay in a cache. Pipes:
the busiest pipe of a multiprocessor's quarter at 1.83 GHz, with programs dealt out evenly, every branch forwards not
taken, and every loop run as often as the launch says. Neither knows of launching (about 2 us outside a graph), of
latency that too few warps leave exposed, or of bank conflicts: a measurement below the estimate means that these rules
are wrong, and one far above it that a kernel waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import roofline
from . import sass

CLOCK = 1.83e9  # Hz
MULTIPROCESSORS, QUARTERS = 132, 4


@dataclass(frozen=True)
class Launch:
    """A launch to estimate: which compilation, how many programs, how often its loops run, and its work."""

    title: str
    compilation: str  # its name
    programs: int
    work: roofline.Work
    trips: tuple[int, ...] = ()  # as for `sass.executed`


@dataclass(frozen=True)
class Estimate:
    launch: Launch
    memory: float  # seconds
    pipe: str  # the busiest
    busy: float  # seconds

    @property
    def seconds(self) -> float:
        return max(self.memory, self.busy)


def estimate(launch: Launch, num_warps: int, machine_code: str) -> Estimate:
    """From sm_90 machine code, as `ahead.compile_for` gives it."""
    cycles = sass.busy_cycles(sass.executed(sass.parse(machine_code), launch.trips))
    pipe = max(cycles, key=cycles.__getitem__)
    rounds = -(-launch.programs // MULTIPROCESSORS)
    return Estimate(
        launch,
        launch.work.bytes / roofline.H100.bandwidth,
        pipe,
        cycles[pipe] * num_warps / QUARTERS * rounds / CLOCK,
    )


def _launches() -> list[Launch]:
    """Those of the encoder's ops at BERT-base's sizes, bf16, with dropout. Of a launch that compiles otherwise by now,
    there is no estimate."""
    rows, hidden, inner = 8192, 768, 3072
    norm, gelu = f"{rows} x {hidden}", f"{rows} x {inner}"
    return [
        Launch(
            f"layer norm forward, {norm}",
            f"layer norm forward, bf16, {hidden} columns, dropout",
            rows // 4,
            roofline.layer_norm(rows, hidden, backward=False),
        ),
        Launch(
            f"layer norm backward, {norm}",
            f"layer norm backward, bf16, {hidden} columns, dropout",
            rows // 32,
            roofline.layer_norm(rows, hidden, backward=True),
            trips=(8,),
        ),
        Launch(
            f"GELU forward, {gelu}",
            f"GELU forward, bf16, {inner} columns",
            rows // 8 * (inner // 256),
            roofline.gelu(rows, inner, backward=False),
        ),
        Launch(
            f"GELU backward, {gelu}",
            f"GELU backward, bf16, {inner} columns",
            -(-rows // 152) * (inner // 256),
            roofline.gelu(rows, inner, backward=True),
            trips=(19,),
        ),
    ]


LAUNCHES = _launches()


def table(found: Sequence[Estimate]) -> str:
    """In Markdown, microseconds."""
    lines = ["| launch | memory | busiest pipe | | estimate |", "|---|--:|---|--:|--:|"]
    for each in found:
        memory, busy, seconds = (f"{1e6 * time:.1f}" for time in (each.memory, each.busy, each.seconds))
        lines.append(f"| {each.launch.title} | {memory} | {each.pipe} | {busy} | {seconds} |")
    return "\n".join(lines)
