"""Several processes: the weights of one process, whatever the recipe, and what happens when one of them is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minbert import train
from minbert.data import token_split
from minbert.ranks import Ranks
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
    """A directory for runs, and what all runs share."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "small.yaml").write_text(json.dumps(SMALL))
    return directory, [f"--config={directory / 'small.yaml'}", f"--data={course_data}"]


@pytest.fixture(scope="module")
def runs(shared):
    """`runs(size)`: the directory with a run of every case by so many processes."""
    directory, options = shared

    def trained(size: int) -> Path:
        out = directory / str(size)
        if not out.exists():
            out.mkdir()
            words = [[*options, "--steps=3", *case.split(), f"--out={out / name}"] for name, case in CASES.items()]
            (out / "options.json").write_text(json.dumps(words))
            script = Path(__file__).with_name("several_runs.py")
            alone = [sys.executable, script, out / "options.json"]
            subprocess.run(command(size, *alone[1:]) if size > 1 else alone, check=True, timeout=500)
        return out

    return trained


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, and the optimizer's state."""
    names = ("model", "heads", "optimizer")
    return {f"{name}.{k}": v for name in names for k, v in load_file(run / "last" / f"{name}.safetensors").items()}


def assert_close(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=2e-6 * max(1.0, float(tensor.abs().max())))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_several_processes_give_the_weights_of_one(case, size, runs):
    assert_close(runs(1) / case, runs(size) / case)
    one, several = (Run(runs(n) / case) for n in (1, size))
    for mine, theirs in zip(one.records(), several.records(), strict=True):
        if "loss" in mine:
            for what in ("loss", "smart", "cosine"):
                assert theirs.get(what, {}) == pytest.approx(mine.get(what, {}), rel=1e-3, abs=1e-4)
            for what in ("grad_norm", "perturbation"):
                assert theirs.get(what, 0) == pytest.approx(mine.get(what, 0), rel=1e-3)
    for name, value in one.summary()["dev"].items():
        assert several.summary()["dev"][name] == pytest.approx(value, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("case", "rows", "gathers"), [("plain", 1, 1), ("smart-pcgrad", 3, 1), ("bregman", 3, 2)])
def test_a_rank_sends_the_bytes_that_the_formula_says(case, rows, gathers, size, runs):
    weights = {name: tensor.numel() for name, tensor in state(runs(1) / case).items() if "optimizer" not in name}
    shared = sum(n for name, n in weights.items() if name.startswith("model"))
    own = sum(n for name, n in weights.items() if name.startswith("heads"))
    expected = 4 * ((rows + gathers) * shared + (1 + gathers) * own) * (size - 1) / size
    sent = [record["bytes_sent"] for record in Run(runs(size) / case).records() if "loss" in record]
    for found in sent:  # on top come alignment, pooled vectors and sums
        assert expected < found < 1.2 * expected + 20_000


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
    assert train.main([*options, *LONG, f"--out={directory / 'whole'}"]) == 0
    return directory / "whole"


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
    run = start(2, launch=("--max-restarts=3",))
    run.wait_for_step(12)
    os.kill(run.worker(0), signal.SIGKILL)
    assert run.process.wait(120) == 0, run.log.read_text()
    assert run.lines("resuming")
    assert_close(whole, tmp_path / "run")


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
