"""bench/gpu.sh: what it refuses, that its phases keep their limits and leave records; the GPU benchmarks' logic."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import phases
import pytest

BENCH = Path(__file__).parents[2] / "bench"
without_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU may be here")


@pytest.fixture(autouse=True)
def records_in_tmp_path(monkeypatch, tmp_path):
    monkeypatch.setattr(phases, "OUT", tmp_path)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def record(directory: Path, name: str) -> dict:
    return json.loads((directory / f"{name}.json").read_text())


@without_gpu
def test_without_a_gpu_it_says_so_and_what_can_be_done():
    done = subprocess.run([BENCH / "gpu.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("bench/gpu.sh: no NVIDIA GPU here")
    assert "bench/gpu/ahead_of_time.py" in done.stderr


def test_a_dry_run_shows_the_chosen_phases():
    done = subprocess.run([BENCH / "gpu.sh", "--dry-run", "race", "build"], capture_output=True, text=True)
    shown = [line.split(",")[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert (done.returncode, shown) == (0, ["build", "race"])
    done = subprocess.run([BENCH / "gpu.sh", "--dry-run", "rice"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no phase 'rice'; phases: report, build, test, bench, race, graph, sanitize" in done.stderr


def test_records_are_few_enough_to_bring_back():
    assert len(phases.phases()) + 1 <= 8  # and one of the benchmarks


def test_a_failing_command_fails_its_phase_but_stops_nothing(tmp_path):
    commands = [python("print('first'); raise SystemExit(3)"), python("print('second')"), ["/no/such/program"]]
    assert not phases.run(phases.Phase("mixed", 60, commands), time.monotonic())
    found = record(tmp_path, "mixed")
    assert not found["ok"]
    assert [(each["ok"], each["output"]) for each in found["commands"]] == [
        (False, ["first"]),
        (True, ["second"]),
        (False, []),
    ]
    assert found["commands"][0]["status"] == "exit status 3"


def test_a_command_past_its_limit_is_interrupted_and_may_still_write(tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('{\"saved\": 1}')"
    started = time.monotonic()
    assert not phases.run(phases.Phase("long", 3, [python(code), python("print('never')")]), started)
    assert time.monotonic() - started < 30
    first, second = record(tmp_path, "long")["commands"]
    assert (first["status"], first["output"]) == ("cut off after 3 s", {"saved": 1})
    assert (second["ok"], second["status"]) == (False, "no time left")


@pytest.mark.slow
def test_the_gpu_benchmarks_run_dry():
    files = sorted(map(str, BENCH.glob("bench_gpu_*.py")))
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "--benchmark-only", "--benchmark-quiet", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        env={**outside, "MINBERT_BENCH_DRY_RUN": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for row in ("attention backward, 16 x 512", "bias_gelu forward", "Gram", "SMART + PCGrad step", "smart_ascend"):
        assert row in done.stdout
