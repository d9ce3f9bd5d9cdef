"""A step of 1 to 4 processes with a thread each, against DistributedDataParallel's plain step in the same run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks_worker import DDP
from steps import METHODS


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks(benchmark, record, smoke: bool, size: int) -> None:
    if smoke and size > 2:
        pytest.skip("once with several is enough to see that it runs")
    script = Path(__file__).with_name("ranks_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", str(script)]
    answer = benchmark.pedantic(
        lambda: subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout, rounds=1
    )
    found = json.loads(answer)
    assert {"plain", DDP} <= found.keys() <= {*METHODS, DDP}
    for name, (seconds, sent, most) in found.items():
        case = f"step of {size} processes, {sent / 1e6:.0f} MB sent by each"
        record(case, name, seconds, seconds / found["plain"][0], bytes_sent=sent, most_tokens=most)
