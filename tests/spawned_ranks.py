"""Processes of a process group, spawned by a test."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minbert.distributed.process_group import ProcessGroup


def run_two_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(rank, *arguments)` in two new processes, and see that both end well."""
    run_ranks(2, function, *arguments)


def run_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(rank, *arguments)` in so many new processes, and see that all end well."""
    context = multiprocessing.get_context("spawn")
    group = [context.Process(target=function, args=(rank, *arguments)) for rank in range(size)]
    for process in group:
        process.start()
    try:
        for process in group:
            process.join(240)
        assert [process.exitcode for process in group] == [0] * size
    finally:
        for process in group:
            process.kill()


def free_port() -> int:
    """A port for `joined`."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@contextmanager
def joined(rank: int, size: int, port: int) -> Iterator[ProcessGroup]:
    """The process group of so many processes on CPUs with a thread each, all of which torchrun would have started."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    with ProcessGroup.join(torch.device("cpu"), 60.0) as group:
        yield group
