"""`train.train` as a library: the process is as it was before, on any thread."""

from __future__ import annotations

import os
import signal
import threading
from unittest.mock import patch

import pytest
import sklearn.metrics  # noqa: F401 (which sets variables of the environment when it is imported first)
import torch
from compare_runs import assert_equal_runs

from minbert import kernels, train
from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.console import Terminal
from minbert.errors import UserError
from minbert.runs.run_directory import Run


def configured(words: list[str]) -> TrainConfig:
    return parse_layers("train", TrainConfig, words)


def process_state() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "backend": kernels.dispatch.choice(),
        "matmul": kernels.matmul(),
        "generator": torch.get_rng_state().tolist(),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        # torch names its compiler's cache when a custom op first runs
        "environment": {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"},
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


def test_a_system_that_counts_no_memory_has_a_summary_and_a_report(quick, tmp_path):
    with patch("minbert.training.training_run.peak_memory_bytes", return_value=None):
        assert train.main([*quick, "--steps=2"]) == 0
    assert Run(tmp_path / "run").summary()["peak_memory_bytes"] is None
    assert "peak memory" not in (tmp_path / "run" / "report.html").read_text()
