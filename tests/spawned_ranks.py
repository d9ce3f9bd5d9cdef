"""Two processes of a process group, spawned by a test."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


def run_two_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(rank, *arguments)` in two new processes, and see that both end well."""
    context = multiprocessing.get_context("spawn")
    group = [context.Process(target=function, args=(rank, *arguments)) for rank in range(2)]
    for process in group:
        process.start()
    try:
        for process in group:
            process.join(240)
        assert [process.exitcode for process in group] == [0, 0]
    finally:
        for process in group:
            process.kill()
