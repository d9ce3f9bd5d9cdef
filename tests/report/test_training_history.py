"""The numbers of a report's charts and tables, from metrics.jsonl and config.yaml."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minbert.config import TrainConfig
from minbert.report.training_history import curves, grid, options, phases, thinned
from minbert.runs.epochs import epochs


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300), st.integers(1, 40))
def test_thinning_keeps_order_and_means(values, limit):
    points = [(float(x), y) for x, y in enumerate(values)]
    found = thinned(points, limit)
    assert len(found) == min(limit, len(points))
    assert [x for x, _ in found] == sorted({x for x, _ in found})
    assert thinned(points, len(points)) == points
    assert thinned(points, 1)[0] == pytest.approx(np.mean(points, axis=0), abs=1e-6)
    steps = thinned([(x, 2 * x) for x, _ in points], limit)
    assert all(y == pytest.approx(2 * x) for x, y in steps)


def test_records_become_curves_grids_and_phases():
    records = [
        {"step": 1, "loss": {"sst": 2.0}, "cosine": {"sst/qqp": -1.0}, "seconds": {"forward": 1.0, "backward": 3.0}},
        {"step": 2, "loss": {"sst": None}, "cosine": {"sst/qqp": None}, "seconds": {"forward": 1.0}},
        {"step": 3, "loss": {"sst": 1.0, "qqp": 4.0}, "cosine": {"sst/qqp": 0.5}, "smart_share": 0.1},
    ]
    assert curves(records, "loss") == {"sst": [(1, 2), (3, 1)], "qqp": [(3, 4)]}
    assert curves(records, "smart_share") == {"smart_share": [(3, 0.1)]}
    assert curves(records, "bregman") == {}
    found = grid(records, "cosine")
    assert (found.names, found.spans, found.largest) == (["sst/qqp"], [(1, 1), (2, 2), (3, 3)], 1)
    assert found.values == [[-1.0, None, 0.5]]
    assert grid(records, "cosine", columns=1).values == [[-0.25]]
    assert grid(records, "magnitude_similarity").names == []
    assert {(phase.name, phase.seconds, phase.share) for phase in phases(records)} == {
        ("forward", 1.0, 0.4),
        ("backward", 1.5, 0.6),
    }
    assert phases([]) == []


def test_the_epochs_are_those_that_were_scored(run):
    found = epochs(run.metrics.records())
    assert [epoch.epoch for epoch in found] == [1, 2]
    best = found[run.summary()["best_epoch"] - 1]
    assert best.overall == run.summary()["dev"]["overall"]
    assert best.scores["sts"] == run.summary()["dev"]["sts"]["pearson"]
    assert set(best.conflict_rate) == {"sst/qqp", "sst/sts", "qqp/sts"}


def test_options_that_differ_from_the_defaults_come_first():
    config = TrainConfig()
    config = config.replace(lr=0.1, batch_size=7, smart=replace(config.smart, steps=3), out="somewhere")
    found = options(config)
    assert {(each.name, each.value, each.default) for each in found[:2]} == {
        ("--batch-size", 7, 32),
        ("--smart.steps", 3, config.smart.steps - 2),
    }
    assert (found[2].name, found[2].resolved) == ("--lr", True)
    assert not [each for each in found[3:] if each.changed or each.resolved]
    assert not {"--out", "--resume"} & {each.name for each in found}
    assert not [each for each in options(TrainConfig()) if each.changed or each.resolved]
