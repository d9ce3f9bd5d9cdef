"""A launch's estimated time follows from its bytes and its machine code."""

from __future__ import annotations

from dataclasses import replace

import estimates
import pytest
import roofline
from test_machine_code import HOPPER


def test_an_estimate_is_the_larger_of_memory_and_the_busiest_pipe():
    launch = estimates.Launch("a launch", "product", programs=133, work=roofline.Work(3_000_000), trips=(100,))
    found = estimates.estimate(launch, 4, HOPPER)
    assert found.memory == pytest.approx(1e-6)
    assert (found.pipe, found.seconds) == ("matrix", pytest.approx(2 * 100 * 32 / estimates.CLOCK))
    assert "| a launch | 1.0 | matrix | 3.5 | 3.5 | 8 |" in estimates.table([found], [8])
    unknown = estimates.estimate(replace(launch, trips=()), 4, HOPPER)
    assert (unknown.pipe, unknown.seconds) == ("unknown: 1 loops instead of 0", pytest.approx(1e-6))
