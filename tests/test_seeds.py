"""Derived seeds."""

from __future__ import annotations

from minbert.seeds import derive_seed


def test_seeds_are_pinned_and_distinct():
    assert derive_seed(0, "dropout", 1) == 2207888992241755396
    seeds = {derive_seed(seed, what, step) for seed in range(10) for what in ("dropout", "data") for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
