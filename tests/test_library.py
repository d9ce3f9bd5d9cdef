"""`train.train` as a library: the process is as it was before, on any thread."""

from __future__ import annotations

import os
import signal
import threading
from unittest.mock import patch

import pytest
import torch
from test_resume import assert_equal_runs

from minbert import kernels, train
from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.console import Terminal
from minbert.errors import UserError


def configured(words: list[str]) -> TrainConfig:
    return parse_layers("train", TrainConfig, words)


def process_state() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "backend": kernels.dispatch.choice(),
        "matmul": kernels.matmul(),
        "generator": torch.get_rng_state().tolist(),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
    }


def test_train_leaves_the_process_as_it_was(quick, tmp_path):
    torch.manual_seed(123)
    before = process_state()
    with patch("minbert.device.ctypes.CDLL", side_effect=AssertionError("malloc's options are the process's own")):
        for name in ("one", "other"):
            options = [*quick, "--steps=2", "--threads=1", "--backend=reference", f"--out={tmp_path / name}"]
            train.train(configured(options), Terminal(quiet=True))
            assert process_state() == before
    assert_equal_runs(tmp_path / "one", tmp_path / "other")
    with pytest.raises(UserError):
        train.train(configured([*options, "--data=/nowhere", f"--out={tmp_path / 'x'}"]), Terminal(quiet=True))
    assert process_state() == before


def test_train_works_off_the_main_thread(quick, tmp_path):
    found: list[object] = []
    config = configured([*quick, "--steps=2"])

    def work() -> None:
        try:
            found.append(train.train(config, Terminal(quiet=True))["steps"])
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [2]
