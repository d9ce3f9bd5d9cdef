"""Whatever call fails while a run writes, and whatever a loss of power takes: the old is there or the new, whole."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from compare_runs import assert_equal_runs
from faults import NAMES, FailingDisk, Gone, RecordingDisk, build
from safetensors.torch import load_file

from minbert import train
from minbert.config import TrainConfig
from minbert.data import Encoded
from minbert.data.skipped import SkippedRow
from minbert.data.tokenizer import Tokenizer
from minbert.errors import UserError
from minbert.files.atomic import recover, verify
from minbert.files.lock import locked
from minbert.model import Encoder, EncoderConfig, MultitaskModel
from minbert.report import plot_run
from minbert.runs import checkpoint
from minbert.runs.predictions import write_predictions
from minbert.runs.progress_counters import Progress, load_progress
from minbert.runs.run_directory import Run
from minbert.tasks import Task, find_tasks, parse_tasks

ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, None]
LIMIT = 1000  # calls


@pytest.fixture(scope="module")
def save() -> Callable[[Path, int], None]:
    """`save(path, step)` writes a checkpoint of this step."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["some words"], 100)
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    tasks = find_tasks(["sst"])
    model = MultitaskModel(Encoder(EncoderConfig(vocab_size=tokenizer.vocab_size, **shape)), tasks)
    bias = model.heads["sst"].bias

    def write(path: Path, step: int) -> None:
        with torch.no_grad():
            bias.fill_(step)
        state = {bias: {"step": torch.tensor(float(step)), "exp_avg": torch.full_like(bias, step)}}
        checkpoint.save(path, model, tokenizer, state, Progress(step=step, seconds=1.0))

    return write


def saved_step(path: Path) -> int | None:
    """The step of the checkpoint that is found after a crash, all files of which agree; None if there is none."""
    recover(path)
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name}
    if not path.exists():
        return None
    verify(path)
    step = load_progress(path).step
    for name in ("heads", "optimizer"):
        for tensor in load_file(path / f"{name}.safetensors").values():
            assert (name == "heads" and tensor.ndim > 1) or (tensor == step).all()
    return step


@pytest.mark.parametrize("first", [False, True], ids=["replaced", "first"])
@pytest.mark.parametrize("error", ERRORS, ids=NAMES.get)
def test_a_checkpoint_survives_any_call_that_fails(save, tmp_path, error, first):
    before = tmp_path / "before"
    before.mkdir()
    if not first:
        save(before / "last", 1)
    old, found = None if first else 1, []
    for at in range(LIMIT):
        run = Path(shutil.copytree(before, tmp_path / str(at)))
        disk = FailingDisk(at, error)
        failed = disk.fails(lambda run=run: save(run / "last", 2))
        found.append(saved_step(run / "last"))
        assert found[-1] in ((old, 2) if failed else (2,))
        shutil.rmtree(run)
        if disk.calls <= at:
            break
    assert 50 < len(found) < LIMIT
    assert set(found) == {old, 2}


@pytest.mark.parametrize("first", [False, True], ids=["replaced", "first"])
def test_a_checkpoint_survives_a_loss_of_power_at_any_moment(save, tmp_path, first):
    run = tmp_path / "run"
    run.mkdir()
    if not first:
        save(run / "last", 1)
    with RecordingDisk(run).watching() as disk:
        save(run / "last", 2)
    old, found, done = None if first else 1, [], set()
    for image in (image for moment in disk.moments for image in moment):
        key = hash(tuple(sorted(image.items())))
        if key not in done:
            done.add(key)
            found.append(saved_step(build(image, tmp_path / f"after {len(done)}") / "last"))
    assert len(done) > 10
    assert set(found) == {old, 2}
    assert saved_step(build(disk.moments[-1][-1], tmp_path / "end") / "last") == 2  # it was synced when `save` returned


def test_a_checkpoint_on_the_disk_has_the_lines_before_it_on_the_disk(save, tmp_path):
    (tmp_path / "runs").mkdir()
    run = Run(tmp_path / "runs" / "run")
    found = []
    with RecordingDisk(tmp_path / "runs").watching() as disk, locked(run.path):
        run.write_options(TrainConfig(seed=7))
        run.metrics.drop_after(0)
        run.metrics.append(line(1))
        run.metrics.sync()
        save(run.last, 1)
    for image in disk.moments[-1]:
        after = Run(build(image, tmp_path / f"after {len(found)}") / "run")
        verify(after.last)
        found.append((after.config().seed, after.metrics.records()))
    assert set(map(str, found)) == {str((7, [line(1)]))}


def test_the_recording_finds_what_was_not_synced(save, tmp_path, monkeypatch):
    """The test before this one can fail: without syncs there are moments at which nothing whole is left."""
    run = tmp_path / "run"
    run.mkdir()
    save(run / "last", 1)
    with RecordingDisk(run).watching() as disk:
        monkeypatch.setattr(RecordingDisk, "_fsync", lambda *arguments: None)
        save(run / "last", 2)
    with pytest.raises((UserError, AssertionError)):  # noqa: PT012
        for number, moment in enumerate(disk.moments):
            for other, image in enumerate(moment):
                assert saved_step(build(image, tmp_path / f"{number} {other}") / "last") in (1, 2)


# The other files of a run -------------------------------------------------------------------------------------------

TASK = find_tasks(["sst"])[0]


def own_task(directory: Path) -> Task:
    record = "{text: a, label: b, type: classification, train: a.csv, dev: 0.1}"
    return parse_tasks(f"tasks:\n  own: {record}\n", "tasks.yaml", directory)["own"]


EXAMPLES = Encoded(*(np.zeros(2, dtype) for dtype in (np.int32, np.uint8)), np.arange(3), None, ["a", "b"], 0)


def line(step: int) -> dict[str, object]:
    return {"step": step, "epoch": 1, "loss": {"sst": 0.5}}


def summed_up(run: Run) -> object:
    path = run.path / "summary.json"
    return json.loads(path.read_text())["steps"] if path.exists() else None


def scores(run: Run) -> object:
    found = run.predictions(TASK, "dev")
    return found and [each.predicted for each in found]


WRITES = {  # how a file is written, and what it is found to hold afterwards: the old or the new
    "config.yaml": (lambda run, n: run.write_options(TrainConfig(seed=n)), lambda run: run.config().seed),
    "metrics.jsonl": (
        lambda run, n: run.metrics.append(line(n)),
        lambda run: [record["step"] for record in run.metrics.records()],
    ),
    "metrics.jsonl cut": (
        lambda run, n: run.metrics.drop_after(2 - n),
        lambda run: [r["step"] for r in run.metrics.records()],
    ),
    "summary.json": (lambda run, n: run.write_summary({"steps": n}), summed_up),
    "no summary.json": (lambda run, n: run.forget_summary(), summed_up),
    "predictions": (
        lambda run, n: write_predictions(
            run.predictions_directory(), TASK, "dev", EXAMPLES, np.eye(5, dtype=np.float32)[[n, n]]
        ),
        scores,
    ),
    "tasks.yaml": (
        lambda run, n: run.write_tasks([replace(own_task(Path("/data")), title=f"{n}")]),
        lambda run: (run.path / "tasks.yaml").read_text() if (run.path / "tasks.yaml").exists() else None,
    ),
    "skipped.jsonl": (
        lambda run, n: run.write_skipped([SkippedRow("train", "sst", "a.csv", n, "", "no label")]),
        lambda run: run.skipped.read_text() if run.skipped.exists() else None,
    ),
}
# Calls at which a disk can fail: at least that of the file, its bytes, their sync and the new name.
CALLS = {"no summary.json": 1, "metrics.jsonl": 2}


@pytest.mark.parametrize("error", ERRORS, ids=NAMES.get)
@pytest.mark.parametrize("name", WRITES)
def test_every_other_file_is_the_old_one_or_the_new(tmp_path, name, error):
    write, read = WRITES[name]
    before = Run(tmp_path / "before")
    before.path.mkdir()
    for each in WRITES:
        if " " not in each:
            WRITES[each][0](before, 1)
    whole = Run(shutil.copytree(before.path, tmp_path / "whole"))
    write(whole, 2)
    allowed, found = (read(before), read(whole)), []
    for at in range(LIMIT):
        run = Run(shutil.copytree(before.path, tmp_path / str(at)))
        disk = FailingDisk(at, error)
        if disk.fails(lambda run=run: write(run, 2)) and error is not None:
            assert not list(run.path.rglob(".*"))
        found.append(read(run))
        assert found[-1] in allowed
        run.metrics.drop_after(8)
        run.metrics.append(line(9))  # a line that follows is whole, whatever was left before it
        assert run.metrics.records()[-1] == line(9)
        if disk.calls <= at:
            break
    assert found[-1] == allowed[1]
    assert disk.calls >= CALLS.get(name, 4)


def test_a_picture_is_the_old_one_or_the_new(tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.metrics.append({**line(1), "seconds": {"forward": 1.0}})
    (first, *_) = plot_run(run)
    old = first.read_bytes()
    run.metrics.append({**line(2), "seconds": {"forward": 2.0}})
    for at in range(1, LIMIT):  # the directory, whose call is the first, is there
        with contextlib.suppress(OSError), FailingDisk(at, errno.ENOSPC).watching():
            plot_run(run)
        assert not list(run.path.rglob(".*"))
        if first.read_bytes() != old:
            break
    assert at >= 4
    found = first.read_bytes()
    plot_run(run)
    assert first.read_bytes() == found


@pytest.mark.parametrize("error", ERRORS, ids=NAMES.get)
def test_a_run_whose_disk_fails_goes_on_to_the_same_end(quick, tmp_path, error, capsys):
    """The disk fails at a call of a save in the middle of the run; the same command with --resume goes on."""
    options = [*quick, "--steps=6", "--checkpoint-steps=2"]
    assert train.main([*options, f"--out={tmp_path / 'straight'}"]) == 0
    real, disk = checkpoint.save, FailingDisk(40, error)

    def failing(path: Path, *rest: object) -> None:
        if rest[3].step == 4:
            with disk.watching():
                real(path, *rest)
        real(path, *rest)

    with patch.object(checkpoint, "save", failing), pytest.raises(Gone if error is None else UserError):
        train.main(options)
    assert json.loads((tmp_path / "run" / "last" / "progress.json").read_text())["step"] == 2
    assert train.main([*options, "--resume"]) == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
def test_a_few_kills_of_the_campaign():
    words = [sys.executable, str(Path(__file__).parents[1] / "kill_campaign.py"), "--count=3", "--seed=0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3 kills (")
