"""Kill a run at random moments, resume it each time, and compare its end with an undisturbed run's, to the bit.

    python tests/kill_campaign.py --count 100 [--seed S]

Runs end and begin anew until there were so many SIGKILLs. Whatever a kill leaves, the checkpoint never falls behind the
one before it, the next --resume goes on, and at the end weights, the optimizer's state, scores and metrics.jsonl are
those of the undisturbed run. It exits with code 1 and says what differed otherwise; --seed repeats the moments.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from compare_runs import state
from course import write_course_data
from groups import quick_options

from minbert import train
from minbert.errors import UserError
from minbert.files.atomic import readable
from minbert.runs.progress_counters import load_progress
from minbert.runs.run_directory import Run

STEPS = 24
OPTIONS = [f"--steps={STEPS}", "--checkpoint-steps=1", "--dropout=0.1", "--threads=1"]


class Failed(Exception):
    """Something was not as in the undisturbed run."""


def work(options: list[str], log: str) -> None:
    """A run, in a process of its own."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        with patch(
            "minbert.training.training_run.plot_run"
        ):  # most of the seconds of so small a run, in which nothing could be lost
            sys.exit(train.main(options))
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)


def start(data: Path, run: Path) -> multiprocessing.process.BaseProcess:
    resume = ["--resume"] if (run / "config.yaml").exists() else []
    options = [*quick_options(data, run), *OPTIONS, *resume]
    process = multiprocessing.get_context("forkserver").Process(target=work, args=(options, f"{run}.log"))
    process.start()
    return process


def saved_step(run: Path) -> int:
    """The step of the last checkpoint, 0 without one."""
    last = readable(run / "last")
    return load_progress(last).step if last.exists() else 0


def check_same(run: Path, whole: Path) -> None:
    """Raise `Failed` unless a run ended as another did."""
    for checkpoint in ("last", "best"):
        found, expected = state(run, checkpoint), state(whole, checkpoint)
        unequal = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
        if unequal or found.keys() != expected.keys():
            raise Failed(f"{checkpoint}/ differs: {', '.join(unequal or found)}")
    for name in ("dev", "best_epoch", "steps", "examples", "skipped_steps"):
        if Run(run).summary()[name] != Run(whole).summary()[name]:
            raise Failed(f"summary.json differs in {name}")
    lines = [[(r["step"], r.get("loss"), r.get("dev")) for r in Run(path).metrics.records()] for path in (run, whole)]
    if lines[0] != lines[1]:
        raise Failed("metrics.jsonl differs")
    left = {path.name for path in run.iterdir()} ^ {path.name for path in whole.iterdir()}
    if left:
        raise Failed(f"one has files that the other does not: {', '.join(sorted(left))}")


def campaign(count: int, seed: int, directory: Path) -> str:
    """Kill `count` times, and say how it went.

    Raises:
        Failed: something was not as in the undisturbed run.
    """
    moments = random.Random(seed)
    data, whole = write_course_data(directory), directory / "whole"
    seconds = 0.0
    for _ in range(2):  # the first start is slower: others may take what it has loaded
        shutil.rmtree(whole, ignore_errors=True)
        started = time.monotonic()
        process = start(data, whole)
        process.join()
        seconds = time.monotonic() - started
    if process.exitcode != 0:
        raise Failed(f"the undisturbed run ended with exit code {process.exitcode}: {whole}.log")
    kills, runs, at = 0, 0, []
    while kills < count:
        run, step = directory / f"run {runs}", 0
        while True:
            process = start(data, run)
            process.join(moments.uniform(0, seconds))
            if process.exitcode is None and kills < count:
                process.kill()
                process.join()
                kills += 1
                at.append(saved_step(run))
                if at[-1] < step:
                    raise Failed(f"{run}/last fell from step {step} to step {at[-1]}")
                step = at[-1]
                continue
            process.join()
            if process.exitcode != 0:
                raise Failed(f"--resume after step {step} ended with exit code {process.exitcode}: {run}.log")
            check_same(run, whole)
            break
        shutil.rmtree(run)
        runs += 1
    before, after = (sum(each == step for each in at) for step in (0, STEPS))
    where = f"{before} before the first checkpoint, {after} after the last step"
    return f"{kills} kills ({where}) of {runs} runs: each ended as the undisturbed one did, to the bit"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Kill runs at random moments, resume them, compare their ends.")
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; a new one when left out")
    options = parser.parse_args(arguments)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["minbert.train", "groups"])
    directory = Path(tempfile.mkdtemp(prefix="minbert-kills-"))
    try:
        print(campaign(options.count, seed, directory))
    except Failed as failure:
        print(f"{failure}\n(--seed {seed}; what is left lies in {directory})")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
