"""The benchmarks of GPUs run dry, and time what training runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_gpu_steps
import pytest
import torch
from gpu_races import gpu_table
from session import Found
from timing import measure_steps

from minbert.training.step_result import StepResult

BENCH = Path(__file__).parents[2] / "bench"
CPU = torch.device("cpu")


def run_dry(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, arguments), "--benchmark-only", "--benchmark-quiet"],
        capture_output=True,
        text=True,
        env={**outside, "MINBERT_BENCH_DRY_RUN": "1"},
    )


def test_results_are_read_one_step_late_and_the_first_steps_do_not_count():
    events = []

    def start():
        number = sum(kind == "begin" for kind, _ in events)
        events.append(("begin", number))
        return lambda: events.append(("read", number))

    timing = measure_steps(start, CPU, warm_up=2, steps=3)
    of_training = [("begin", 0), ("begin", 1), ("read", 0), ("begin", 2), ("read", 1), ("begin", 3), ("read", 2)]
    assert events[: len(of_training)] == of_training
    assert events[len(of_training) :][:3] == [("begin", 4), ("read", 3), ("read", 4)]
    of_the_host = events[len(of_training) + 3 :]
    assert of_the_host == [(kind, number) for number in (5, 6, 7) for kind in ("begin", "read")]
    assert timing.steps == 3
    assert timing.host <= timing.seconds * 100


def test_our_step_is_the_one_of_training():
    start = bench_gpu_steps.ours("PCGrad", bench_gpu_steps.TINY, 2, CPU, 2, graphs=True)
    first, second = start()(), start()()
    assert isinstance(first, StepResult)
    assert first.examples == 6
    assert {"batch", "backward", "update"} <= set(first.seconds)
    assert first.conflicts["cosine"]
    assert first.loss["sst"] != second.loss["sst"]


def test_peers_copy_their_batches_and_return_the_loss():
    start = bench_gpu_steps.theirs("pcgrad", bench_gpu_steps.TINY, 2, CPU, 2)
    losses = [start()()["loss"] for _ in range(3)]
    assert all(len(loss) == 1 for loss in losses)
    assert len({loss for (loss,) in losses}) == 3


def test_who_is_not_there_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(bench_gpu_steps.importlib.util, "find_spec", lambda name: None if name == "torchjd" else name)
    assert bench_gpu_steps.missing(f"transformers, {bench_gpu_steps.TORCHJD}") == "torchjd is not installed"
    assert bench_gpu_steps.missing("minbert without CUDA graphs") is None
    found = Found()
    found.leave_out("case", "FlashAttention 3", ModuleNotFoundError("No module named 'flash_attn_interface'\nmore"))
    found.leave_out("case", "silent", AssertionError())
    found.leave_out("other", "silent", AssertionError())
    assert found.left_out["case"] == {
        "FlashAttention 3": "No module named 'flash_attn_interface'",
        "silent": "AssertionError",
    }
    assert list(gpu_table(found)) == [
        "left out of 1 cases: FlashAttention 3, No module named 'flash_attn_interface'",
        "left out of 2 cases: silent, AssertionError",
    ]


def test_the_record_is_there_after_each_benchmark(tmp_path):
    """The second one ends the process at once, as a kill would."""
    (tmp_path / "test_two.py").write_text(
        "import os\n"
        "def test_first(gpu_race):\n"
        "    gpu_race('first', {'minbert': lambda i: None}, __import__('roofline').Work(1))\n"
        "def test_second(gpu_race):\n"
        "    os._exit(9)\n"
    )
    out = tmp_path / "out" / "record.json"
    done = run_dry("-c", BENCH.parent / "pyproject.toml", "-p", "conftest", f"--minbert-record={out}", tmp_path)
    assert done.returncode == 9, done.stdout[-2000:]
    record = json.loads(out.read_text())
    assert [row["case"] for row in record["rows"]] == ["first"]
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_the_gpu_benchmarks_run_dry(tmp_path):
    done = run_dry(*sorted(BENCH.glob("bench_gpu_*.py")), f"--minbert-record={tmp_path / 'record.json'}")
    assert done.returncode == 0, done.stdout[-3000:]
    for row in ("attention backward, 16 x 512", "bias_gelu forward", "Gram", "SMART + PCGrad step", "smart_ascend"):
        assert row in done.stdout
    assert "FlashAttention 3" in done.stdout
    record = json.loads((tmp_path / "record.json").read_text())
    steps = [row for row in record["rows"] if row["timer"] == "steps"]
    assert {"minbert", "minbert without CUDA graphs"} <= {row["name"] for row in steps}
    assert all(row["host_seconds"] > 0 and row["items_per_second"] > 0 for row in steps)
    assert "knows no dropout" in record["left_out"]["attention forward, 64 x 128, p 0.1"].values()
