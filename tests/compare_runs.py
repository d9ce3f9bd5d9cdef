"""Comparisons of the checkpoints of runs, and interrupted runs."""

from __future__ import annotations

import itertools
import math
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from groups import SMALL
from safetensors.torch import load_file

from minbert.runs.run_directory import Run


@contextmanager
def interrupted(function: str, call: int) -> Iterator[None]:
    """Expect a KeyboardInterrupt, which is raised in this call (from 0) of a function, by its full name."""
    real, calls = pkgutil.resolve_name(function), itertools.count()

    def replacement(*arguments: object) -> object:
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments)

    with patch(function, replacement), pytest.raises(KeyboardInterrupt):
        yield


def tensors(run: Path, checkpoint: str, *files: str) -> dict[str, torch.Tensor]:
    loaded = {name: load_file(run / checkpoint / f"{name}.safetensors") for name in files}
    return {f"{name}.{key}": value for name, file in loaded.items() for key, value in file.items()}


def weights(run: Path, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    return tensors(run, checkpoint, "model", "heads")


def state(run: Path, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    """Weights, and the optimizer's state."""
    return tensors(run, checkpoint, "model", "heads", "optimizer")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Equal to the bit."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_equal_runs(one: Path, other: Path) -> None:
    assert_equal(state(one), state(other))


def assert_close(one: Path, other: Path, within: float = 5e-6) -> None:
    """Equal to float32 rounding: within 5e-6 of a tensor's largest number, and what a gradient of 0 rounds to.

    Such a gradient is that of a bias before a BatchNorm: a sum of numbers that cancel. What is left of them differs
    with the order of the sum, and so with the processor: by 2^-24 of the largest gradient in each of three steps, from
    which Adam's first moment has 1 - 0.9^3. A weight moves as far as that, as these runs' epsilon is their rate.
    """
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    moments = [float(x.abs().max()) for name, x in first.items() if re.search(r"\.exp_avg(@|$)", name)]
    rounding = max(1e-8, 3 * 2**-24 * max(moments, default=0.0) / (1 - 0.9**3))
    for name, tensor in first.items():
        found, expected = (x.sqrt() if "exp_avg_sq" in name else x for x in (second[name], tensor))
        most = within * float(expected.abs().max()) + rounding
        torch.testing.assert_close(found, expected, rtol=0, atol=most, msg=lambda text, name=name: f"{name}: {text}")


def bf16_bound(layers: int) -> float:
    """How far two gradients of one batch may lie apart that were computed in bf16 in two ways, as a share of either.

    bf16 rounds by at most u = 2^-8 of a number. On its way to a weight's gradient through L layers a number is rounded
    2 + 26 L times: embeddings and gradient once each, and in a layer 9 outputs of ops and 4 weights, forward and
    backward. Roundings are independent, with a root mean square of u / sqrt(3), and n of them in each of two gradients
    come to sqrt(2 n) u / sqrt(3). The sqrt(3) that is left out here is for what a network enlarges.
    """
    return math.sqrt(2 * (2 + 26 * layers)) * torch.finfo(torch.bfloat16).eps / 2


def assert_close_in_bf16(one: Path, other: Path, layers: int = SMALL["scratch"]["num_hidden_layers"]) -> None:
    """Losses, gradient norms and moments (which are gradients times a constant) that differ by what bf16 rounds.

    A hundredth of all moments is added to what a tensor of them may differ by: where what it sums cancels, as for the
    keys' biases, only roundings are left.
    """
    within = bf16_bound(layers)
    for mine, theirs in zip(Run(one).metrics.records(), Run(other).metrics.records(), strict=True):
        if "loss" in mine:
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=within)
            assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=within)
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for kind, power in (("exp_avg", 1.0), ("exp_avg_sq", 0.5)):
        names = [name for name in first if re.search(rf"\.{kind}(@|$)", name)]
        whole = torch.stack([first[name].pow(power).norm() for name in names]).norm()
        for name in names:
            expected = first[name].pow(power)
            apart = (second[name].pow(power) - expected).norm()
            assert apart <= within * (expected.norm() + whole / 100), name
