"""The phases of bench/gpu.sh: each is a few commands with a time limit, and a record of their results."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
OUT = Path(os.environ.get("OUT") or WORK / "out").absolute()
PYTHON = sys.executable
WORKERS = min(12, os.cpu_count() or 1)  # of pytest: Triton compiles in all of them
PYTEST = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "--durations=5"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "application-only"]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
INTERRUPTED, ENDED = 10.0, 2.0  # seconds from SIGINT to SIGKILL, and from there to the end
KEPT, LONGEST = 60, 500  # lines of a command's output that its record keeps, and their characters
MOST_LOGGED = 8 * 2**20  # characters of log.txt


@dataclass(frozen=True)
class Command:
    """A command line, and the seconds that it should take on an H200 with 16 cores."""

    words: Sequence[str]
    seconds: int


@dataclass(frozen=True)
class Phase:
    """Commands that run one after the other, all of them even if one fails.

    Args:
        limit: seconds for all of them.
        least: seconds that it needs to be worth its start.
    """

    name: str
    limit: float
    least: float
    commands: Sequence[Command]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> int:
        return sum(command.seconds for command in self.commands)


def phases() -> list[Phase]:
    """Most valuable first: the time may end after any of them. The first five are the essential ones."""
    parallel = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    first = ["tests/gpu/test_ops.py", "tests/gpu/test_training.py"]
    graphs = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*graph*.py"))
    races = ["tests/gpu/test_repeats.py"]
    others = ["--continue-on-collection-errors", *(f"--ignore={path}" for path in (*first, *graphs, *races))]
    calls = [PYTHON, "tests/gpu/op_calls.py"]
    wheels = sorted(str(wheel) for wheel in (WORK / "wheels").glob("*.whl"))
    install = [PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    build = [
        Command([*install, "--target", str(WORK / "site"), *wheels], 5),
        Command([PYTHON, "bench/gpu/build_in_place.py"], 70),
        Command([PYTHON, "bench/gpu/check_build.py"], 8),
    ]
    ops = ["bench/bench_gpu_ops.py", "bench/bench_gpu_update.py"]
    return [
        Phase("report", 60, 15, [Command([PYTHON, "bench/gpu/report.py"], 20)]),
        Phase("build", 180, 40, build if wheels else build[1:]),
        Phase("smoke", 100, 30, [Command([*PYTEST, *parallel, "-m", "gpu and not slow", *first], 60)]),
        Phase("steps", 170, 45, [Command([*_bench("steps"), "bench/bench_gpu_steps.py"], 150)]),
        Phase(
            "ops",
            180,
            30,
            [
                Command([*_bench("ops"), *ops, "-k", "not 0.0"], 110),
                Command([*_bench("attention_without_dropout"), ops[0], "-k", "0.0"], 45),
            ],
        ),
        Phase("graph", 120, 25, [Command([*PYTEST, "-m", "gpu", *graphs], 85)]),
        Phase("race", 120, 40, [Command([*PYTEST, "-m", "gpu", *races], 60)]),
        Phase("rest", 200, 60, [Command([*PYTEST, *parallel, "-m", "gpu", "tests", *others], 110)]),
        Phase(
            "sanitize",
            420,
            60,
            # once without a tool: Triton compiles then, and the tools find its kernels in the cache
            [Command(calls, 30), *(Command([*SANITIZER, "--tool", tool, *calls], 70) for tool in TOOLS)],
            # each tensor is a separate allocation, so that the tools see where it ends
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
    ]


def _bench(record: str) -> list[str]:
    """The start of a command line of benchmarks with a record in $OUT."""
    options = ["-p", "no:cacheprovider", "--benchmark-only", "--benchmark-quiet"]
    return [PYTHON, "-m", "pytest", *options, f"--minbert-record={OUT / record}.json"]


# A call of several phases ----------------------------------------------------------------------------------------


class Call:
    """Phases within a budget of seconds: log.txt has what is printed, phases.json what has come out so far."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.budget, self.started = out, budget, time.monotonic()
        self._records: list[dict[str, Any]] = []
        self._room = MOST_LOGGED
        out.mkdir(parents=True, exist_ok=True)
        self._log = open(out / "log.txt", "w", encoding="utf-8", buffering=1)  # noqa: SIM115  open while this is

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def say(self, line: str) -> None:
        """Print a line, and log it as far as there is room."""
        print(line, flush=True)
        if self._room > 0:
            self._log.write(line[: self._room] + "\n")
            self._room -= len(line) + 1

    def run(self, phase: Phase) -> str:
        """Run a phase in the time that is left for it: "passed", "FAILED" or, where that is too little, "skipped"."""
        limit = min(phase.limit, self.budget - self.seconds - INTERRUPTED - ENDED)
        begun, record = self.seconds, {"phase": phase.name, "ok": False, "seconds": 0.0, "commands": []}
        self._records.append(record)
        if limit < phase.least:
            record["skipped"] = f"{max(limit, 0):.0f} s are left, and it needs {phase.least:.0f}"
            self.say(f"\n=== [{begun:5.0f} s] {phase.name}: skipped, {record['skipped']}")
            self._write()
            return "skipped"
        self.say(f"\n=== [{begun:5.0f} s] {phase.name} (at most {limit:.0f} s, about {phase.seconds})")
        for command in phase.commands:
            found = self.execute(command.words, limit - (self.seconds - begun), phase.environment)
            record["commands"].append(found)
            record["ok"] = all(each["ok"] for each in record["commands"])
            record["seconds"] = round(self.seconds - begun, 1)
            self._write()
        verdict = "passed" if record["ok"] else "FAILED"
        self.say(f"\n=== [{self.seconds:5.0f} s] {phase.name}: {verdict} in {record['seconds']} s")
        return verdict

    def _write(self) -> None:
        content = {"budget": self.budget, "seconds": round(self.seconds, 1), "phases": self._records}
        (self.out / "phases.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def execute(self, words: Sequence[str], limit: float, environment: Mapping[str, str]) -> dict[str, Any]:
        """Run a command and show what it prints; past its limit it is interrupted, so that it can still write."""
        shown = shlex.join(words).replace(f"{ROOT}/", "")
        self.say(f"+ {shown}")
        if limit <= 0:
            return _result(shown, "no time left")
        begun, lines = time.monotonic(), deque[str](maxlen=4 * KEPT)
        try:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env={**os.environ, **_environment(), **environment},
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self.say(str(error))
            return _result(shown, str(error))

        def read() -> None:
            for line in process.stdout or ():
                lines.append(line.rstrip()[:LONGEST])
                self.say(line.rstrip())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        late = not _ends_within(process, limit)
        if late:
            _signal(process, signal.SIGINT)
            _ends_within(process, INTERRUPTED)
        _signal(process, signal.SIGKILL)  # what it has left behind as well
        code = process.wait()
        reader.join(ENDED)  # a process of another session may hold the pipe open
        status = f"cut off after {limit:.0f} s" if late else f"exit status {code}"
        kept = list(lines)
        output = _as_json(kept) or kept[-KEPT:]
        return _result(shown, status, code == 0 and not late, time.monotonic() - begun, output)


def _result(command: str, status: str, ok: bool = False, seconds: float = 0.0, output: object = ()) -> dict[str, Any]:
    return {"command": command, "ok": ok, "status": status, "seconds": round(seconds, 1), "output": output or []}


def _ends_within(process: subprocess.Popen[str], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return True
    return False


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """To its process group, if that is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _environment() -> dict[str, str]:
    """minbert is that of this tree; packages of wheels come before the machine's."""
    path = [str(ROOT), str(WORK / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _as_json(lines: Sequence[str]) -> dict[str, Any] | None:
    """What a command printed, if that was a JSON object and nothing else."""
    try:
        found = json.loads("\n".join(lines))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def missing_packages(wheels: Path = WORK / "wheels") -> list[str]:
    """What minbert depends on and is neither installed nor among the wheels."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = project.partition("\ndependencies = [")[2].partition("\n]")[0]  # tomllib is of Python 3.11
    needed = re.findall(r'^ *"([\w.-]+)', lines, re.MULTILINE)
    there = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    there |= {wheel.name.split("-")[0] for wheel in wheels.glob("*.whl")}
    known = {re.sub(r"[-_.]+", "-", name).lower() for name in there}
    return [name for name in needed if name not in known]


# The command line ------------------------------------------------------------------------------------------------


def plan(chosen: Sequence[Phase]) -> Iterator[str]:
    """What would run, with the seconds that it should take."""
    for phase in chosen:
        yield f"{phase.name}, about {phase.seconds} s, at most {phase.limit:.0f}:"
        for command in phase.commands:
            yield f"  {command.seconds:4d} s  " + shlex.join(command.words).replace(f"{ROOT}/", "")
    yield f"about {sum(phase.seconds for phase in chosen)} s in all"


def main() -> int:
    known = phases()
    names = [phase.name for phase in known]
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="All GPU work in one command.")
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=", ".join(names))
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="of the whole call (480)")
    parser.add_argument("--dry-run", action="store_true", help="show the commands and run none")
    options = parser.parse_args()
    if unknown := [name for name in options.phases if name not in names]:
        parser.error(f"no phase {unknown[0]!r}; phases: {', '.join(names)}")
    chosen = [phase for phase in known if phase.name in (options.phases or names)]
    if options.dry_run:
        print("\n".join(plan(chosen)))
        return 0
    if absent := missing_packages():
        parser.error(
            f"not installed here: {', '.join(absent)}; bench/gpu/wheels.sh fetches wheels, where there is a network"
        )
    call, results = Call(OUT, options.budget), dict[str, str]()
    for phase in chosen:
        results[phase.name] = call.run(phase)
        if phase.name == "build" and results["build"] == "FAILED" and not options.phases:
            call.say("the rest would time the reference: it is left out; name phases to run them all the same")
            break
    call.say("\n" + ", ".join(f"{name} {verdict}" for name, verdict in results.items()))
    return 1 if "FAILED" in results.values() else 0


if __name__ == "__main__":
    sys.exit(main())
