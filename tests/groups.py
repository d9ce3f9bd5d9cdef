"""Command lines of several processes, and runs to compare."""

from __future__ import annotations

import fcntl
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from minbert.report import plot_run
from minbert.runs.run_directory import Run

# Adam divides a gradient that is 0 but for rounding by itself: a large epsilon keeps that out of the weights.
SMALL = {
    "batch_size": 8,
    "log_steps": 1,
    "dropout": 0.1,
    "adam_eps": 1e-3,
    "precision": "fp32",
    "scratch": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2},
}


def quick_options(data: Path, out: Path) -> list[str]:
    """Options of a run of twelve steps in two epochs with a very small encoder."""
    options = {
        "data": data,
        "out": out,
        "precision": "fp32",
        "batch-size": 8,
        "epochs": 2,
        "checkpoint-steps": 4,
        "log-steps": 1,
        "scratch.hidden-size": 16,
        "scratch.num-attention-heads": 2,
        "scratch.intermediate-size": 32,
        "scratch.num-hidden-layers": 1,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def command(size: int, *words: str | Path, options: tuple[str, ...] = ()) -> list[str]:
    """A command line of `size` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *options]
    return [sys.executable, *launcher, *map(str, words)]


def once(directory: Path, make: Callable[[Path], object]) -> Path:
    """A directory that is made by the first of pytest's workers to need it."""
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = Path(f"{directory}.done")
        if not done.exists():
            make(directory)
            done.touch()
    return directory


@contextmanager
def quickly() -> Iterator[None]:
    """A context without what takes longer than a small run itself: its plots, and waiting for the disk."""
    with patch("minbert.training.training_run.plot_run"), patch("os.fsync", lambda descriptor: None):
        yield


def drawing() -> AbstractContextManager[object]:
    """A context in which runs draw their plots."""
    return patch("minbert.training.training_run.plot_run", plot_run)


def state(run: Path, checkpoint: str = "last") -> dict[str, torch.Tensor]:
    """Weights, and the optimizer's state."""
    files = {name: run / checkpoint / f"{name}.safetensors" for name in ("model", "heads", "optimizer")}
    return {f"{name}.{key}": value for name, file in files.items() for key, value in load_file(file).items()}


def assert_close(one: Path, other: Path, within: float = 5e-6) -> None:
    """Equal to float32 rounding: within 5e-6 of a tensor's largest number, and 1e-8, as a gradient of 0 rounds."""
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        found, expected = (x.sqrt() if "exp_avg_sq" in name else x for x in (second[name], tensor))
        most = within * float(expected.abs().max()) + 1e-8
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
    for mine, theirs in zip(Run(one).records(), Run(other).records(), strict=True):
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
