"""Train several runs one after another in one group of processes, each forked from one that has imported everything.

The ranks speak as over `backend`, whatever carries it: what NCCL is given runs over gloo too. No plots and no reports
are written, which would take longer than such small runs.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from groups import quickly
from rich.console import Console

from minbert.cli import parse_layers
from minbert.config import TrainConfig
from minbert.device import resolve_device
from minbert.distributed.process_group import ProcessGroup
from minbert.train import start


def train_all(cases: dict[str, list[str]], size: int, out: Path, device: str = "cpu", backend: str = "") -> None:
    """Train a run of every case by so many processes, to a directory of its name in `out`."""
    out.mkdir()
    runs = [[*options, f"--out={out / name}"] for name, options in cases.items()]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    # What the first op imports, too; in this process it would bring Triton before its interpreter is chosen.
    context.set_forkserver_preload(["several_runs", "torch._dynamo"])
    group = [context.Process(target=_rank, args=(rank, size, port, runs, device, backend)) for rank in range(size)]
    for process in group:
        process.start()
    try:
        for process in group:
            process.join(300)
        assert [process.exitcode for process in group] == [0] * size
    finally:
        for process in group:
            process.kill()


def _rank(rank: int, size: int, port: int, runs: list[list[str]], device: str, backend: str) -> None:
    """Be one of the processes."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    as_over = patch.object(ProcessGroup, "backend", backend) if backend else nullcontext()
    no_report, no_waiting = patch("minbert.training.training_run.write_report"), quickly()
    with no_report, no_waiting, ProcessGroup.join(resolve_device(device), 60.0) as group, as_over:
        for options in runs:
            config = parse_layers("train", TrainConfig, options)
            assert config.precision != "auto", "what it chooses depends on the processor"
            start(config, Console(quiet=True), group)
    # A thread that is left may want a tensor's memory freed when there is no interpreter any more: that aborts.
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads
