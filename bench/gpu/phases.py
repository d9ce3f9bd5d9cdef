"""The phases of bench/gpu.sh: each is a few commands with a time limit, and a JSON record of their results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
PYTHON = str(WORK / "venv" / "bin" / "python")
OUT = Path(os.environ.get("OUT") or WORK / "out")
PYTEST = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "application-only"]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
KEPT = 60  # lines of a command's output that its record keeps


@dataclass(frozen=True)
class Phase:
    """Commands that run one after the other, all of them even if one fails."""

    name: str
    limit: int  # seconds for all of them
    commands: Sequence[Sequence[str]]
    environment: dict[str, str] = field(default_factory=dict)


def phases() -> list[Phase]:
    """Most valuable first: a call may be cut off."""
    benches = ["bench/bench_gpu_ops.py", "bench/bench_gpu_update.py", "bench/bench_gpu_steps.py"]
    gpu_tests = ["-m", "gpu", "--durations=5", "-rfE"]
    own_phase = ["tests/gpu/test_repeats.py", "tests/gpu/test_graphs.py"]
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    build = [
        [sys.executable, "-m", "venv", "--without-pip", str(WORK / "venv")],
        [PYTHON, __file__, "--link-packages", *packages],
        [PYTHON, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."],
        [PYTHON, "-c", "from minbert import kernels; print(kernels.backends('cuda'))"],
    ]
    if wheels := sorted(str(wheel) for wheel in (WORK / "wheels").glob("*.whl")):
        build.insert(2, [PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels])
    calls = [PYTHON, "tests/gpu/op_calls.py"]
    return [
        Phase("report", 90, [[sys.executable, "bench/gpu/report.py"]]),
        Phase("build", 300, build, {"MINBERT_CUDA": "1", **_architecture()}),
        Phase("test", 240, [[*PYTEST, *gpu_tests, "tests", *(f"--ignore={path}" for path in own_phase)]]),
        Phase("bench", 420, [[*PYTEST, *benches, "--benchmark-only", "--benchmark-quiet", "--minbert-results"]]),
        Phase("race", 120, [[*PYTEST, *gpu_tests, own_phase[0]]]),
        Phase("graph", 90, [[*PYTEST, *gpu_tests, own_phase[1]]]),
        Phase(
            "sanitize",
            420,
            # once without a tool: Triton compiles then, and the tools find its kernels in the cache
            [calls, *([*SANITIZER, "--tool", tool, *calls] for tool in TOOLS)],
            # each tensor is a separate allocation, so that the tools see where it ends
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
    ]


def _architecture() -> dict[str, str]:
    """Only this device's, for a short build; CUDAARCHS chooses otherwise."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        return {"CUDAARCHS": os.environ.get("CUDAARCHS", found[0].replace(".", ""))}
    return {}


# Running them ----------------------------------------------------------------------------------------------------


def say(text: str, started: float) -> None:
    print(f"\n=== [{time.monotonic() - started:5.0f} s] {text}", flush=True)


def run(phase: Phase, started: float) -> bool:
    """Run a phase, write its record, and return whether every command succeeded."""
    begun, results = time.monotonic(), []
    say(f"{phase.name} (at most {phase.limit} s)", started)
    for command in phase.commands:
        left = phase.limit - (time.monotonic() - begun)
        results.append(execute(command, left, phase.environment))
        record = {"phase": phase.name, "ok": all(result["ok"] for result in results), "commands": results}
        record["seconds"] = round(time.monotonic() - begun, 1)
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / f"{phase.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"{phase.name}: {'passed' if record['ok'] else 'FAILED'} in {record['seconds']} s", started)
    return bool(record["ok"])


def execute(command: Sequence[str], limit: float, environment: dict[str, str]) -> dict[str, object]:
    """Run a command and show what it prints; past its limit it is interrupted, so that it can still write results."""
    shown = " ".join(os.path.relpath(part) if part.startswith(str(ROOT)) else part for part in command)
    print(f"+ {shown}", flush=True)
    begun, lines = time.monotonic(), []
    if limit <= 0:
        return {"command": shown, "ok": False, "status": "no time left", "seconds": 0.0, "output": []}
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        print(error, flush=True)
        return {"command": shown, "ok": False, "status": str(error), "seconds": 0.0, "output": []}
    timers = [
        threading.Timer(limit, os.killpg, (process.pid, signal.SIGINT)),
        threading.Timer(limit + 15, os.killpg, (process.pid, signal.SIGKILL)),
    ]
    for timer in timers:
        timer.start()
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    code = process.wait()
    seconds = time.monotonic() - begun
    for timer in timers:
        timer.cancel()
    late = seconds >= limit
    status = f"cut off after {limit:.0f} s" if late else f"exit status {code}"
    return {
        "command": shown,
        "ok": code == 0 and not late,
        "status": status,
        "seconds": round(seconds, 1),
        "output": as_json(lines) or lines[-KEPT:],
    }


def as_json(lines: Sequence[str]) -> object:
    """What a command printed, if that was JSON and nothing else."""
    try:
        return json.loads("\n".join(lines))
    except ValueError:
        return None


def link_packages(directories: Sequence[str]) -> None:
    """Let this environment see the packages of another one, after its own."""
    own = Path(site.getsitepackages()[0])
    (own / "machine.pth").write_text("\n".join(directories) + "\n")


def collect_benchmarks(started: float) -> None:
    """Copy the newest record of bench/results that this call wrote to $OUT, and show its rows again."""
    records = sorted((ROOT / "bench" / "results").glob("*.json"))
    if not records or records[-1].stat().st_mtime < started:
        return
    shutil.copy(records[-1], OUT / "results.json")
    rows = [row for row in json.loads(records[-1].read_text())["rows"] if row.get("floor")]
    print(f"\n{'case':<46} {'who':<36} {'us':>9} {'floor':>9} {'x floor':>8} {'goal':>7}")
    for row in rows:
        goal = f"{1e6 * row['goal']:7.0f}" if row["goal"] else ""
        print(
            f"{row['case']:<46} {row['name']:<36} {1e6 * row['seconds']:9.1f} {1e6 * row['floor']:9.1f}"
            f" {row['seconds'] / row['floor']:8.2f} {goal:>7}"
        )


def main() -> int:
    known = phases()
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="All GPU work in one command.")
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=", ".join(phase.name for phase in known))
    parser.add_argument("--dry-run", action="store_true", help="show the commands and run none")
    options = parser.parse_args()
    names = options.phases or [phase.name for phase in known]
    if unknown := [name for name in names if name not in [phase.name for phase in known]]:
        parser.error(f"no phase {unknown[0]!r}; phases: {', '.join(phase.name for phase in known)}")
    chosen = [phase for phase in known if phase.name in names]
    if options.dry_run:
        for phase in chosen:
            print(f"{phase.name}, at most {phase.limit} s:")
            for command in phase.commands:
                print("  " + re.sub(re.escape(str(ROOT)) + "/", "", " ".join(command)))
        return 0
    if not Path(PYTHON).exists() and not {"build", "report"} & set(names):
        parser.error("nothing is built yet: add the phase build")
    started, wall = time.monotonic(), time.time()
    results = {phase.name: run(phase, started) for phase in chosen}
    collect_benchmarks(wall)
    print("\n" + ", ".join(f"{name} {'passed' if ok else 'FAILED'}" for name, ok in results.items()))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--link-packages"]:
        link_packages(sys.argv[2:])
    else:
        sys.exit(main())
