"""Rows of sparse gradients over several processes: each rank gets its shard of the sum, and sends what others lack."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch
from torch import Tensor

from minbert.distributed.process_group import ProcessGroup

ROWS, COLUMNS = 11, 5
HELD = [[0, 1, 4, 10], [], [1, 4, 5, 6, 9]]  # the rows of each rank's matrix


def matrix(rank: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + rank)
    values = torch.randn(len(HELD[rank]), COLUMNS, generator=generator)
    rows = torch.tensor([HELD[rank]], dtype=torch.int64)
    return torch.sparse_coo_tensor(rows, values, (ROWS, COLUMNS), check_invariants=False, is_coalesced=True)


def _rank(rank: int, world_size: int, port: int, size: int) -> None:
    where = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in where.items()})
    with ProcessGroup.join(torch.device("cpu"), 60.0) as group:
        before = group.bytes_sent
        started = [group.reduce_scatter_rows(matrix(rank, seed=seed), size) for seed in range(2)]  # both at once
        for seed, (shard, pending) in enumerate(started):
            pending.wait()
            total = sum(
                (matrix(other, seed=seed).to_dense() for other in range(world_size)), torch.zeros(ROWS, COLUMNS)
            )
            expected = torch.nn.functional.pad(total.flatten(), (0, world_size * size - total.numel()))
            torch.testing.assert_close(shard, expected[rank * size : (rank + 1) * size])
        starts = [range(other * size // COLUMNS, -(-(other + 1) * size // COLUMNS)) for other in range(world_size)]
        rows = sum(row in of_other for other, of_other in enumerate(starts) if other != rank for row in HELD[rank])
        assert group.bytes_sent - before == 2 * (rows * (8 + 4 * COLUMNS) + 8 * (world_size - 1))


@pytest.mark.parametrize(("world_size", "size"), [(2, 28), (3, 19), (3, 55)], ids=["2", "3", "an empty shard"])
def test_each_rank_gets_its_shard_of_the_sum(world_size: int, size: int) -> None:
    """Shards are cut within rows, and the last ones reach over the end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    group = [context.Process(target=_rank, args=(rank, world_size, port, size)) for rank in range(world_size)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    assert [process.exitcode for process in group] == [0] * world_size
