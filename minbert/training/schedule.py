"""The learning rate as a pure function of the step."""

from __future__ import annotations


def learning_rate_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Share of the peak learning rate at `step` of `total`, counted from 0.

    It rises linearly over the first `warmup` share of the steps, then falls linearly to reach 0 at `total`
    ("linear") or stays ("constant").
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return (total - step) / (total - rising) if schedule == "linear" else 1.0
