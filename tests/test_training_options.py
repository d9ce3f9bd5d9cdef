"""Class weights, smoothing, frozen layers, layer-wise decay and patience, with every method and by several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from compare_runs import assert_close, assert_equal_runs, interrupted, state, weights
from groups import once
from own_task_files import write_tasks
from several_runs import train_all

from minbert import train
from minbert.runs.progress_counters import load_progress
from minbert.runs.run_directory import Run

OPTIONS = {
    "weights and smoothing": ["--label-smoothing=0.1"],
    "smoothing of one task": ["--label-smoothing.tags=0.2"],
    "freeze": ["--freeze-layers=1"],
    "decay": ["--layer-decay=0.5", "--head-lr=0.01"],
    "patience": ["--patience=1", "--lr=0.1", "--warmup=0", "--schedule=constant", "--epoch-length=2", "--epochs=4"],
    "all": ["--label-smoothing=0.1", "--freeze-layers=1", "--layer-decay=0.5", "--patience=1"],
}
METHODS = {
    "smart-pcgrad": [],
    "gse": ["--recipe=gse"],
    "low memory, accumulated": ["--low-memory", "--accumulate=2", "--bregman.mu=0.5"],
}
SIX_STEPS = ("--epochs=3", "--epoch-length=2", "--lr=1e-3")


@pytest.fixture(scope="module")
def own(shared, tmp_path_factory) -> list[str]:
    """The options of small runs of own tasks: all of these have class weights, but for the scores."""
    file = write_tasks(tmp_path_factory.mktemp("own"))
    small = next(option for option in shared[1] if option.startswith("--config="))
    return [small, f"--tasks-file={file}", *SIX_STEPS]


@pytest.fixture
def unfinished() -> Iterator[None]:
    """Without predictions and a report at the end of a run: its checkpoints are what is compared."""
    with patch("minbert.training.training_run.TrainingRun.finish"):
        yield


@pytest.mark.usefixtures("unfinished")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(name, method, own, tmp_path):
    options = [*own, *METHODS[method], *OPTIONS[name], "--checkpoint-steps=1"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train.main([*options, f"--out={straight}"]) == 0
    if name == "patience":
        assert load_progress(straight / "last").step < 8, "it never runs out"
    with interrupted("minbert.training.loop.training_step", 3):
        train.main([*options, f"--out={resumed}"])
    assert load_progress(resumed / "last").step == 3
    assert train.main([*options, f"--out={resumed}", "--resume"]) == 0
    assert_equal_runs(straight, resumed)
    assert load_progress(resumed / "last").scores == load_progress(straight / "last").scores


@pytest.mark.usefixtures("unfinished")
@pytest.mark.parametrize("name", ["weights and smoothing", "freeze", "decay"])
def test_each_option_leads_to_other_weights(name, own, tmp_path):
    """A negative control of the tests of equal runs."""
    for directory, options in (("without", []), ("with", OPTIONS[name])):
        assert train.main([*own, "--steps=2", *options, f"--out={tmp_path / directory}"]) == 0
    one, other = weights(tmp_path / "without"), weights(tmp_path / "with")
    changed = [key for key in one if not one[key].equal(other[key])]
    assert changed


@pytest.mark.usefixtures("unfinished")
def test_one_task_a_step_has_rates_by_layer_in_each_optimizer(own, tmp_path):
    options = [*own, "--recipe=plain", "--sampling=round-robin", "--optimizers=per-task", "--checkpoint-steps=1"]
    options += ["--layer-decay=0.5", "--freeze-layers=1", "--label-smoothing=0.1"]
    assert train.main([*options, f"--out={tmp_path / 'straight'}"]) == 0
    with interrupted("minbert.training.loop.training_step", 3):
        train.main([*options, f"--out={tmp_path / 'resumed'}"])
    assert train.main([*options, f"--out={tmp_path / 'resumed'}", "--resume"]) == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "resumed")
    moments = {key for key in state(tmp_path / "resumed") if "layers.1.qkv.weight.exp_avg@" in key}
    assert {key.rpartition("@")[2] for key in moments} == {"topics", "same", "stars", "tags"}


# Several ranks -------------------------------------------------------------------------------------------------------

ALL = ["--label-smoothing=0.1", "--freeze-layers=1", "--layer-decay=0.5", "--patience=1"]
CASES = {
    "smart-pcgrad": [],
    "gse": ["--recipe=gse"],
    "low memory, accumulated": METHODS["low memory, accumulated"],
    "plain": ["--recipe=plain"],
}


@pytest.fixture(scope="module")
def runs(own, shared):
    """`runs(size)`: the directory with a run of every case by so many processes."""
    cases = {name: [*own, *ALL, *case] for name, case in CASES.items()}
    return lambda size: once(shared[0] / f"own-{size}", lambda out: train_all(cases, size, out))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_own_tasks_as_one_does(case, runs):
    one, two = (Path(runs(size) / case) for size in (1, 2))
    assert_close(one, two)
    for mine, theirs in zip(Run(one).metrics.records(), Run(two).metrics.records(), strict=True):
        for what in ("loss", "smart", "bregman"):
            assert theirs.get(what, {}) == pytest.approx(mine.get(what, {}), rel=1e-5, abs=1e-6)
