"""Batches of real lengths have fewer shapes than graphs are kept, and little padding."""

from __future__ import annotations

import pytest
from batches import DECILES
from graph_shapes import SEGMENTS, drawn, met

from minbert.training.cuda_graphs import MOST_GRAPHS


@pytest.mark.parametrize("batches", SEGMENTS)
def test_shapes_are_fewer_than_graphs(batches):
    shapes, padded = met({task: drawn(task) for task in DECILES}, SEGMENTS[batches], 2000)
    assert len(shapes) < 20 < MOST_GRAPHS
    assert padded < (0.04 if len(SEGMENTS[batches]) == 1 else 0.13)
