"""Races between functions, and what the benchmarks of a session have found so far."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from records import write_record

DRY_RUN = os.environ.get("MINBERT_BENCH_DRY_RUN") == "1"
SMOKE = os.environ.get("MINBERT_BENCH_SMOKE") == "1" or DRY_RUN
LONGEST_REASON = 160  # characters


class Race:
    """Functions that are timed in turns, so that all meet the same state of the machine.

    Args:
        pause: seconds before each call: the threads of the function before, which spin while they wait for more work,
            have gone to sleep by then.
    """

    def __init__(self, functions: Mapping[str, Callable[[], object]], pause: float = 0.0) -> None:
        self._functions, self._pause = functions, pause
        self._seconds: dict[str, list[float]] = {name: [] for name in functions}

    def warm_up(self) -> None:
        """Call each once: pages, caches, threads."""
        for function in self._functions.values():
            function()

    def time(self, *names: str) -> None:
        """Call these functions, one after the other."""
        for name in names:
            time.sleep(self._pause)
            start = time.perf_counter()
            self._functions[name]()
            self._seconds[name].append(time.perf_counter() - start)

    @property
    def medians(self) -> dict[str, float]:
        """The median seconds of a call of each."""
        return {name: statistics.median(times) for name, times in self._seconds.items()}


@dataclass
class Found:
    """Rows of the tables, and what stands beside them.

    Args:
        record: the file that has it all as JSON after each call of `write`; None for none.
    """

    record: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    profiles: dict[str, dict[str, float]] = field(default_factory=dict)  # case -> component -> seconds
    peak_bytes: dict[str, dict[str, int]] = field(default_factory=dict)  # case -> who
    ceilings: dict[str, float] = field(default_factory=dict)  # what the GPU reaches
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)  # case -> who -> why

    def leave_out(self, case: str, name: str, why: object) -> None:
        """Note why a contender of a case is not there: the beginning of the first line of `why`."""
        line = next(iter(str(why).strip().splitlines()), "")
        self.left_out.setdefault(case, {})[name] = line[:LONGEST_REASON] or type(why).__name__

    def write(self) -> None:
        """Rewrite the record, if there is to be one."""
        if self.record is not None and (self.rows or self.peak_bytes or self.left_out):
            more = {"ceilings": self.ceilings} if self.ceilings else {}
            more |= {"left_out": self.left_out} if self.left_out else {}
            write_record(self.rows, path=self.record, profiles=self.profiles, peak_bytes=self.peak_bytes, **more)


FOUND = pytest.StashKey[Found]()
