"""What becomes of a run of several processes when one of them is lost, silent or stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare_runs import assert_close
from groups import command, once

from minbert import train
from minbert.runs.run_directory import Run

LONG = ["--recipe=pcgrad", "--steps=60", "--checkpoint-steps=5"]


class Started:
    """A run of several processes, with its output in a file."""

    def __init__(self, words: list[str], log: Path, run: Path) -> None:
        self.log, self.run = log, run
        with open(log, "w") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)

    def wait_for_step(self, step: int) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            if any(record["step"] >= step for record in Run(self.run).metrics.records()):
                return
            time.sleep(0.02)
        raise AssertionError(f"no step {step} within two minutes")

    def worker(self, rank: int) -> int:
        """The process of a rank."""
        launcher = self.process.pid
        for pid in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise AssertionError(f"no rank {rank}")

    def lines(self, start: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(start)]


@pytest.fixture
def start(shared, tmp_path):
    """`start(size, options)`: a run of so many processes in `tmp_path / "run"`."""
    _, options = shared
    started = []

    def run(size: int, *words: str, launch: tuple[str, ...] = ()) -> Started:
        words = ("-m", "minbert.train", *options, *LONG, f"--out={tmp_path / 'run'}", *words)
        started.append(Started(command(size, *words, options=launch), tmp_path / "log", tmp_path / "run"))
        return started[-1]

    yield run
    for each in started:
        each.process.kill()


@pytest.fixture(scope="module")
def whole(shared) -> Path:
    """The same run by one process that nobody disturbs."""
    directory, options = shared

    def make(out: Path) -> None:
        assert train.main([*options, *LONG, f"--out={out}"]) == 0

    return once(directory / "whole", make)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_one_line(start, whole, tmp_path, shared):
    run = start(3)
    run.wait_for_step(12)
    os.kill(run.worker(1), signal.SIGKILL)
    assert run.process.wait(60) != 0
    (line,) = run.lines("error: ")
    found = re.fullmatch(
        r"error: rank 1 was lost after step (\d+); (.*)/last holds step (\d+): the same command.*", line
    )
    assert found
    assert int(found[3]) % 5 == 0
    assert int(found[1]) - 5 <= int(found[3]) <= int(found[1])
    assert train.main([*shared[1], *LONG, f"--out={tmp_path / 'run'}", "--resume"]) == 0  # by one process
    assert_close(whole, tmp_path / "run")


@pytest.mark.slow
def test_torchrun_starts_a_run_again_where_it_stood(start, whole, tmp_path):
    run = start(2, launch=("--max-restarts=1",))
    run.wait_for_step(12)
    os.kill(run.worker(0), signal.SIGKILL)
    assert run.process.wait(120) == 0, run.log.read_text()
    assert run.lines("resuming")
    assert_close(whole, tmp_path / "run")


@pytest.fixture
def machines(shared, tmp_path):
    """`machines(options)`: the exit codes and outputs of two launchers, each in a working directory of its own."""
    _, options = shared

    def run(*words: str) -> list[tuple[int, str]]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        how = [f"--rdzv-endpoint=localhost:{port}", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        train = ["-m", "minbert.train", *options, *LONG, *words]
        started = []
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            command = [sys.executable, "-m", "torch.distributed.run", *how, *train]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, cwd=tmp_path / name, stdout=pipe, stderr=pipe, text=True))
        outputs = [each.communicate(timeout=120)[1] for each in started]
        return [(each.returncode, output) for each, output in zip(started, outputs, strict=True)]

    return run


@pytest.mark.slow
def test_two_machines_that_share_a_file_system(machines, whole, tmp_path):
    assert [code for code, _ in machines(f"--out={tmp_path / 'run'}")] == [0, 0]
    assert_close(whole, tmp_path / "run")


@pytest.mark.slow
def test_two_machines_that_do_not_are_told_before_the_first_step(machines, tmp_path):
    (first, one), (second, other) = machines("--out=run")
    assert 0 not in (first, second)
    (line,) = (line for line in f"{one}\n{other}".splitlines() if line.startswith("error: "))
    assert line == "error: run is not there for every process: all machines have to share its file system"
    for resume in (False, True):  # what the first one left refuses neither
        with Run(tmp_path / "one" / "run").opened(resume):
            pass


@pytest.mark.slow
def test_a_silent_rank_is_given_up(start):
    run = start(2, "--timeout=3")
    run.wait_for_step(5)
    silent = run.worker(1)
    os.kill(silent, signal.SIGSTOP)
    until = time.monotonic() + 30
    while not run.lines("error: ") and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(silent, signal.SIGKILL)
    assert run.process.wait(60) != 0
    assert [line for line in run.lines("error: ") if line.startswith("error: rank 1 was lost after step")]


@pytest.mark.slow
def test_ranks_that_lost_torchrun_too_say_so(start):
    run = start(3, "--steps=400")
    run.wait_for_step(5)
    workers = [run.worker(rank) for rank in range(3)]
    run.process.kill()
    os.kill(workers[0], signal.SIGKILL)
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    lines = run.lines("error: ")
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(r"error: the ranks lost torchrun and one another \(.*\) after step \d+; .*", line)
    assert "Traceback" not in run.log.read_text()


@pytest.mark.slow
def test_a_rank_without_a_sign_of_life_is_lost_to_those_whose_gpu_waits(tmp_path):
    (tmp_path / "waiting.py").write_text(
        "import os, signal, time, torch\n"
        "from minbert.distributed import liveness\n"
        "from minbert.distributed.process_group import ProcessGroup\n"
        "liveness.HEARTBEAT_INTERVAL, liveness.LIVENESS_TIMEOUT = 0.1, 3.0\n"
        "class Event:\n"
        "    def __init__(self, seconds): self.there = time.monotonic() + seconds\n"
        "    def query(self): return time.monotonic() > self.there\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun's, which training notes\n"
        "with ProcessGroup.join(torch.device('cpu'), 60.0) as group, group.liveness.heartbeat():\n"
        "    group.liveness.wait_for(Event(4.0))\n"
        "    group.broadcast_object('all waited')\n"
        "    if group.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    group.liveness.wait_for(Event(1000.0))\n"
    )
    with open(tmp_path / "log", "w") as log:
        words = command(3, tmp_path / "waiting.py")
        assert subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, timeout=60).returncode != 0
    text = (tmp_path / "log").read_text()
    assert [line for line in text.splitlines() if line.startswith("error: ")] == ["error: rank 1 was lost"]


@pytest.mark.slow
def test_a_run_that_is_stopped_is_saved_and_goes_on_with_fewer_processes(start, whole, tmp_path):
    run = start(4)
    run.wait_for_step(7)
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(60)
    assert len(run.lines("stopped; ")) == 1
    again = start(2, "--resume")
    assert again.process.wait(120) == 0, again.log.read_text()
    assert again.lines("resuming")
    assert_close(whole, tmp_path / "run")


@pytest.mark.slow
def test_bad_input_is_said_once(start):
    run = start(2, "--batch-size=1", "--tasks=sst", "--steps=1")
    assert run.process.wait(60) != 0
    assert run.lines("error: ") == [
        "error: a batch of 1 examples is too small for 2 processes; give a larger --batch-size, or fewer processes"
    ]
    again = start(2, "--batch-size=8", "--tasks=sst", "--steps=1")  # into the same directory
    assert again.process.wait(60) == 0, again.log.read_text()
