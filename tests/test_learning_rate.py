"""The learning rate's schedule."""

from __future__ import annotations

import pytest

from minbert.training.schedule import learning_rate_factor


def test_learning_rate_rises_then_falls_to_zero_or_stays():
    linear = [learning_rate_factor(step, 100, 0.1, "linear") for step in range(100)]
    assert linear[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(linear) == 1.0
    assert linear[10:] == pytest.approx([(100 - i) / 90 for i in range(10, 100)])
    assert [learning_rate_factor(step, 100, 0.1, "constant") for step in (0, 9, 50, 99)] == [0.1, 1.0, 1.0, 1.0]
    assert learning_rate_factor(0, 1, 0.0, "linear") == 1.0
