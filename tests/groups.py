"""Command lines of several processes, and runs to compare."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from minbert.report import plot_run

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
    with patch("minbert.finish.plot_run"), patch("os.fsync", lambda descriptor: None):
        yield


def drawing() -> AbstractContextManager[object]:
    """A context in which runs draw their plots."""
    return patch("minbert.finish.plot_run", plot_run)


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, and the optimizer's state."""
    names = ("model", "heads", "optimizer")
    return {f"{name}.{k}": v for name in names for k, v in load_file(run / "last" / f"{name}.safetensors").items()}


def assert_close(one: Path, other: Path, within: float = 5e-6) -> None:
    """Equal to float32 rounding: within 5e-6 of a tensor's largest number, and 1e-8, as a gradient of 0 rounds."""
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        found, expected = (x.sqrt() if "exp_avg_sq" in name else x for x in (second[name], tensor))
        most = within * float(expected.abs().max()) + 1e-8
        torch.testing.assert_close(found, expected, rtol=0, atol=most, msg=lambda text, name=name: f"{name}: {text}")
