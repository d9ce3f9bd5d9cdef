"""Options of small runs, and command lines of several processes."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest.mock import patch

from minbert.report import plot_run

# Adam divides a gradient that is 0 but for rounding by itself: a large epsilon keeps that out of the weights.
SMALL = {
    "recipe": "smart-pcgrad",
    "batch_size": 8,
    "log_steps": 1,
    "dropout": 0.1,
    "adam_eps": 1e-3,
    "precision": "fp32",
    "scratch": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2},
}

SWEEP_OPTIONS = """
checkpoint_steps: 1
precision: fp32
scratch: {hidden_size: 16, num_attention_heads: 2, intermediate_size: 32, num_hidden_layers: 1}
"""  # a file for minbert reproduce


def quick_options(data: Path, out: Path) -> list[str]:
    """Options of a run of twelve steps in two epochs with a very small encoder, with SMART and PCGrad."""
    options = {
        "data": data,
        "out": out,
        "recipe": "smart-pcgrad",
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
