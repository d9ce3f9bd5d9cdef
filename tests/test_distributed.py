"""Several processes: the weights of one process, whatever the recipe, and what happens when one of them is lost."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from course import write_further_data
from safetensors.torch import load_file

from minbert import train
from minbert.data import token_split
from minbert.errors import UserError
from minbert.ranks import Ranks
from minbert.recipes import paper, papers
from minbert.reproduce import FILES
from minbert.runs import Run

SIZES = (2, 3, 4)
# Adam divides a gradient that is 0 but for rounding by itself: a large epsilon keeps that out of the weights.
SMALL = {
    "batch_size": 8,
    "log_steps": 1,
    "dropout": 0.1,
    "adam_eps": 1e-3,
    "scratch": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2},
}
CASES = {
    "plain": "--recipe=plain",
    "smart-pcgrad": "",
    "smart-2-norm": "--smart.norm=2 --smart.per=sequence --smart.steps=2 --smart.masks=independent",
    "gse": "--recipe=gse",
    "bregman": "--recipe=pcgrad --bregman.mu=1 --bregman.beta=0.5",
    "accumulate": "--accumulate=2 --recipe=pcgrad",
    "low-memory": "--low-memory --recipe=pcgrad",
    "groups": "--recipe=pcgrad --surgery-groups=sst+qqp,sts",
    "one-task-a-step": "--recipe=plain --sampling=round-robin --optimizers=per-task",
    "batch-norm": "--recipe=pcgrad --shared-layer=transform --heads.sst=layers --heads.sts=concatenated-layers-cosine",
    "negatives": "--recipe=plain --heads.qqp=difference --losses.qqp=multiple_negatives_ranking",
    "norms": "--recipe=pcgrad --l2=0.1 --pooling=mean",
    "frozen": "--recipe=plain --mode=pretrain --pooling=pooler",
}


def command(size: int, *words: str | Path, options: tuple[str, ...] = ()) -> list[str]:
    """A command line of `size` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *options]
    return [sys.executable, *launcher, *map(str, words)]


@pytest.fixture(scope="module")
def shared(course_data, tmp_path_factory) -> tuple[Path, list[str]]:
    """A directory for the runs that tests share, and the options of all runs."""
    own = tmp_path_factory.getbasetemp()
    directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "ranks"
    directory.mkdir(exist_ok=True)
    (directory / "small.yaml").write_text(json.dumps(SMALL))
    return directory, [f"--config={directory / 'small.yaml'}", f"--data={course_data}"]


def once(directory: Path, make: Callable[[Path], object]) -> Path:
    """A directory that is made by the first of pytest's workers to need it."""
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = Path(f"{directory}.done")
        if not done.exists():
            make(directory)
            done.touch()
    return directory


def train_all(cases: dict[str, list[str]], size: int, out: Path, *how: str) -> None:
    """Train a run of every case by so many processes, to a directory of its name in `out`; `how`: device, backend."""
    out.mkdir()
    (out / "options.json").write_text(json.dumps([[*words, f"--out={out / name}"] for name, words in cases.items()]))
    words = [Path(__file__).with_name("several_runs.py"), out / "options.json", *(how or ["cpu"])]
    subprocess.run(command(size, *words) if size > 1 else [sys.executable, *words], check=True, timeout=500)


@pytest.fixture(scope="module")
def runs(shared):
    """`runs(size)`: the directory with a run of every case by so many processes."""
    directory, options = shared
    cases = {name: [*options, "--steps=3", *case.split()] for name, case in CASES.items()}
    return lambda size: once(directory / str(size), lambda out: train_all(cases, size, out))


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, and the optimizer's state."""
    names = ("model", "heads", "optimizer")
    return {f"{name}.{k}": v for name in names for k, v in load_file(run / "last" / f"{name}.safetensors").items()}


def assert_close(one: Path, other: Path, within: float = 5e-6) -> None:
    """Equal to float32 rounding: within 5e-6 of a tensor's largest number, and 1e-8, as a gradient of 0 rounds."""
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        found, expected = (x.sqrt() if "exp_avg_sq" in name else x for x in (second[name], tensor))
        most = within * float(expected.abs().max()) + 1e-8
        torch.testing.assert_close(found, expected, rtol=0, atol=most, msg=lambda text, name=name: f"{name}: {text}")


def assert_same(one: Run, several: Run) -> None:
    """The same weights, moments, losses and scores."""
    assert_close(one.path, several.path)
    for mine, theirs in zip(one.records(), several.records(), strict=True):
        if "loss" in mine:
            for what in ("loss", "smart", "cosine"):
                assert theirs.get(what, {}) == pytest.approx(mine.get(what, {}), rel=1e-5, abs=1e-6)
            for what in ("grad_norm", "perturbation"):
                assert theirs.get(what, 0) == pytest.approx(mine.get(what, 0), rel=1e-5)
    for name, value in one.summary()["dev"].items():
        assert several.summary()["dev"][name] == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_several_processes_give_the_weights_of_one(case, size, runs):
    assert_same(Run(runs(1) / case), Run(runs(size) / case))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_what_nccl_is_given_gives_the_weights_of_one_process(size, shared, runs, tmp_path):
    cases = {name: [*shared[1], "--steps=3", *CASES[name].split()] for name in ("smart-pcgrad", "gse", "bregman")}
    train_all(cases, size, tmp_path / "runs", "cpu", "nccl")
    for name in cases:
        assert_same(Run(runs(1) / name), Run(tmp_path / "runs" / name))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_weights_of_one(shared, tmp_path):
    cases = {name: [*shared[1], "--steps=3", "--precision=fp32", *case.split()] for name, case in CASES.items()}
    for size in (1, 2):
        train_all(cases, size, tmp_path / str(size), "cuda")
    for name in cases:
        assert_close(tmp_path / "1" / name, tmp_path / "2" / name, within=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", papers())
def test_two_processes_give_the_weights_of_one_with_every_row_of_a_paper(number, shared, tmp_path):
    _, options = shared
    files = {name: f"--{FILES[name]}={path}" for name, path in write_further_data(tmp_path).items()}
    cases = {
        name: [*options, "--steps=2", f"--recipe={number}/{name}", *(files[need] for need in row.needs)]
        for name, row in paper(number).rows.items()
    }
    for size in (1, 2):
        train_all(cases, size, tmp_path / str(size))
    for name in cases:
        assert_same(Run(tmp_path / "1" / name), Run(tmp_path / "2" / name))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("case", "rows", "gathers", "passes"), [("plain", 1, 1, 1), ("smart-pcgrad", 3, 1, 3), ("bregman", 3, 2, 2)]
)
def test_a_rank_sends_the_bytes_that_the_formula_says(case, rows, gathers, passes, size, runs):
    def elements(kind: str) -> int:  # parameters begin at multiples of 16 elements, and so do the ranks' parts
        weights = [tensor.numel() for name, tensor in state(runs(1) / case).items() if name.startswith(f"{kind}.")]
        return up(sum(up(n, 16) for n in weights), 16 * size)

    def up(n: int, to: int) -> int:
        return -(-n // to) * to

    parameters = 4 * ((rows + gathers) * elements("model") + (1 + gathers) * elements("heads"))
    pooled = 4 * passes * 3 * SMALL["batch_size"] * SMALL["scratch"]["hidden_size"]
    for record in Run(runs(size) / case).records():
        if "loss" in record:
            sent = record["bytes_sent"] * size / (size - 1)
            # a rank with fewer sequences than another sends as many vectors; sums of a few numbers come on top
            assert parameters + pooled <= sent <= parameters + 1.5 * pooled


def test_ranks_get_stretches_of_about_as_many_tokens():
    rng = np.random.default_rng(0)
    for parts in (1, 2, 3, 7):
        for n in (parts, parts + 1, 96):
            lengths = rng.integers(3, 60, n)
            bounds = token_split(lengths, parts)
            assert bounds[0] == 0
            assert bounds[-1] == n
            assert (np.diff(bounds) >= 1).all()
            if n == 96:
                tokens = np.add.reduceat(lengths, bounds[:-1])
                assert tokens.max() - tokens.min() <= 60
    with pytest.raises(ValueError, match="at least 3 examples for as many parts, got 2"):
        token_split(np.array([5, 5]), 3)


def test_one_process_is_a_group_of_its_own():
    ranks = Ranks()
    assert ranks.leads
    assert ranks.agreed("word") == "word"
    assert ranks.told(1) == [1]
    assert ranks.highest(3) == 3
    assert torch.equal(ranks.sum_(torch.ones(2)), torch.ones(2))
    assert ranks.sent == 0


@pytest.mark.parametrize("size", ["2", "x"])
def test_processes_that_nobody_started_are_one_line(size, monkeypatch, quick):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=f"the {size} processes cannot join: .*RANK expected"):
        train.main(quick)


# Failures ---------------------------------------------------------------------------------------------------------


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
            if any(record["step"] >= step for record in Run(self.run).records()):
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
    return once(directory / "whole", lambda out: train.main([*options, *LONG, f"--out={out}"]))


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_one_line(start, whole, tmp_path, shared):
    run = start(3)
    run.wait_for_step(12)
    os.kill(run.worker(1), signal.SIGKILL)
    killed = time.monotonic()
    assert run.process.wait(60) != 0
    assert time.monotonic() - killed < 30
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
def test_two_machines_that_do_not_are_told_before_the_first_step(machines):
    (first, one), (second, other) = machines("--out=run")
    assert 0 not in (first, second)
    (line,) = (line for line in f"{one}\n{other}".splitlines() if line.startswith("error: "))
    assert line == "error: run is not there for every process: all machines have to share its file system"


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
        "from minbert import ranks\n"
        "ranks.BEAT, ranks.SILENCE = 0.1, 3.0\n"
        "class Event:\n"
        "    def __init__(self, seconds): self.there = time.monotonic() + seconds\n"
        "    def query(self): return time.monotonic() > self.there\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun's, which training notes\n"
        "with ranks.Ranks.joined(torch.device('cpu'), 60.0) as group, group.beating():\n"
        "    group.wait_for(Event(4.0))\n"
        "    group.agreed('all waited')\n"
        "    if group.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    group.wait_for(Event(1000.0))\n"
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
    assert len(run.lines("stopped after step")) == 1
    again = start(2, "--resume")
    assert again.process.wait(120) == 0, again.log.read_text()
    assert again.lines("resuming")
    assert_close(whole, tmp_path / "run")


@pytest.mark.slow
def test_bad_input_is_said_once(start):
    run = start(2, "--batch-size=1", "--tasks=sst")
    assert run.process.wait(60) != 0
    assert run.lines("error: ") == [
        "error: a batch of 1 examples is too small for 2 processes; give a larger --batch-size, or fewer processes"
    ]
