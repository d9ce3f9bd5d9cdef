"""A run: what it writes, that it repeats itself to the bit, and how it stops and goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compare_runs import assert_equal, bf16_bound, weights
from groups import drawing, quick_options
from safetensors.torch import load_file

from minbert import kernels, train
from minbert.data import open_source
from minbert.device import resolve_precision
from minbert.errors import UserError
from minbert.files.atomic import verify
from minbert.report.comparison_report import our_scores
from minbert.runs import checkpoint
from minbert.runs.run_directory import Run
from minbert.tasks import TASKS
from minbert.training.objective import Objective


def start(options: list[str], **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minbert.train", *options]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until metrics.jsonl tells of `step`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the run ended before step {step}: {process.stdout.read() if process.stdout else ''}")
        if any(record["step"] >= step for record in Run(run).metrics.records()):
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step} within two minutes")


@pytest.fixture(scope="module")
def finished(course_data, tmp_path_factory) -> Path:
    """A finished run, for tests that only read it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with drawing():
        assert train.main(quick_options(course_data, run)) == 0
    return run


def test_a_run_leaves_what_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    dev = summary["dev"]
    assert dev["overall"] == pytest.approx(
        (dev["sst"]["accuracy"] + dev["qqp"]["accuracy"] + (dev["sts"]["pearson"] + 1) / 2) / 3
    )
    assert summary["steps"] == 12
    assert summary["examples"] == 12 * 3 * 8
    assert summary["best_epoch"] in (1, 2)
    assert summary["examples_per_second"] > 0
    assert summary["peak_memory_bytes"] > 1e6
    assert summary["backends"]["gram"] in ("native", "reference")
    for name in ("best", "last"):
        verify(finished / name)
        assert {"config.json", "model.safetensors", "vocab.txt", "heads.safetensors", "optimizer.safetensors"} <= {
            file.name for file in (finished / name).iterdir()
        }
    records = Run(finished).metrics.records()
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["epoch"] for r in records if "dev" in r] == [1, 2]
    assert (finished / "plots" / "curves.png").stat().st_size > 1000


def test_a_labelled_test_split_is_scored_by_the_best_epoch(course_data, quick, tmp_path):
    directory = shutil.copytree(course_data, tmp_path / "data")
    shutil.copyfile(directory / "ids-sst-dev.csv", directory / "ids-sst-test-student.csv")
    assert train.main([*quick, f"--data={directory}"]) == 0
    summary = Run(tmp_path / "run").summary()
    assert summary["test"] == {"sst": summary["dev"]["sst"], "overall": summary["dev"]["sst"]["accuracy"]}
    assert our_scores(Run(tmp_path / "run"))["sst test"] == summary["dev"]["sst"]["accuracy"]


def test_the_epsilon_of_adamw_is_an_option(quick, tmp_path):
    for name, eps in (("run", 1e-8), ("other", 1e-2)):
        assert train.main([*quick, "--steps=1", f"--adam-eps={eps}", f"--out={tmp_path / name}"]) == 0
    first, second = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_predictions_are_in_the_courses_format(finished):
    lines = (finished / "predictions" / "sst-dev-output.csv").read_text().splitlines(keepends=True)
    assert lines[0] == "id \t Predicted_Sentiment \n"
    assert lines[1].startswith("sdev0 , ")
    assert lines[1].endswith(" \n")
    assert len(lines) == 25
    names = {path.name for path in (finished / "predictions").iterdir()}
    stems = ("sst-dev", "sst-test", "para-dev", "sts-dev")
    assert names == {name for stem in stems for name in (f"{stem}-output.csv", f"{stem}.jsonl")}


def test_beside_them_lie_labels_lengths_and_probabilities(finished, course_data):
    run = Run(finished)
    for name, stem, classes in (("sst", "sst", 5), ("qqp", "para", 2), ("sts", "sts", 0)):
        task = TASKS[name]
        lines = (finished / "predictions" / f"{stem}-dev-output.csv").read_text().splitlines()[1:]
        examples = open_source(str(course_data)).load(task, "dev")
        found = run.predictions(task, "dev")
        assert [f"{each.id} , {each.predicted} " for each in found] == lines
        assert [each.label for each in found] == pytest.approx(examples.labels.tolist())
        assert all(each.tokens > len(text.split()) for each, text in zip(found, examples.texts, strict=True))
        for each in found:
            assert len(each.probabilities or ()) == classes
            if classes:
                assert sum(each.probabilities) == pytest.approx(1, abs=1e-5)
                assert each.probabilities[int(each.predicted)] == max(each.probabilities)
    assert all(each.label is None for each in run.predictions(TASKS["sst"], "test"))
    assert run.predictions(TASKS["cfimdb"], "dev") is None


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, quick, tmp_path):
    assert train.main(quick) == 0
    assert_equal(weights(finished), weights(tmp_path / "run"))
    losses = lambda run: [r["loss"] for r in Run(run).metrics.records() if "loss" in r]  # noqa: E731
    assert losses(finished) == losses(tmp_path / "run")
    assert train.main([*quick, f"--out={tmp_path / 'other'}", "--seed=1"]) == 0
    assert losses(finished) != losses(tmp_path / "other")


@pytest.mark.parametrize("killed_at", [2, 5, 7])  # before the first checkpoint, in the first epoch, in the second
def test_killed_and_resumed_equals_never_killed(finished, quick, tmp_path, killed_at):
    process = start(quick)
    wait_for_step(tmp_path / "run", killed_at, process)
    process.kill()
    process.wait()
    assert train.main([*quick, "--resume"]) == 0
    assert_equal(weights(finished), weights(tmp_path / "run"))
    steps = [record["step"] for record in Run(tmp_path / "run").metrics.records() if "loss" in record]
    assert steps == list(range(1, 13))
    resumed, straight = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", finished))
    assert resumed["dev"] == straight["dev"]
    assert resumed["best_epoch"] == straight["best_epoch"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_goes_on_from_that_step(finished, quick, tmp_path, number):
    quick = [*quick, "--checkpoint-steps=1000"]
    process = start(quick)
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.fail(f"the run ended before the signal could stop it: {output}")
    assert process.returncode == 128 + number
    assert "--resume" in output
    assert "Traceback" not in output
    verify(tmp_path / "run" / "last")
    saved = json.loads((tmp_path / "run" / "last" / "progress.json").read_text())
    assert saved["step"] >= 2
    assert train.main([*quick, "--resume"]) == 0
    assert_equal(weights(finished), weights(tmp_path / "run"))


def test_resuming_a_finished_run_changes_nothing(finished, quick, tmp_path):
    assert train.main(quick) == 0
    assert train.main([*quick, "--resume"]) == 0
    assert_equal(weights(finished), weights(tmp_path / "run"))


def test_a_second_run_into_the_directory_is_refused(quick, finished):
    before = (finished / "summary.json").read_bytes()
    with pytest.raises(UserError, match="holds a run: give --resume"):
        train.main([*quick, f"--out={finished}"])
    assert (finished / "summary.json").read_bytes() == before


def test_resume_refuses_other_options_and_other_data(quick, tmp_path, course_data):
    assert train.main([*quick, "--steps=2"]) == 0
    with pytest.raises(UserError, match=r"--lr \(was 0.0015, is 0.5\)"):
        train.main([*quick, "--steps=2", "--lr=0.5", "--resume"])
    sentences = (course_data / "ids-sst-train.csv").read_text()
    try:
        (course_data / "ids-sst-train.csv").write_text(sentences.replace("was", "is"))
        with pytest.raises(UserError, match="training data of sst changed"):
            train.main([*quick, "--steps=2", "--resume"])
    finally:
        (course_data / "ids-sst-train.csv").write_text(sentences)


def test_nothing_to_resume_is_said(quick, tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        train.main([*quick, "--resume"])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "heads.safetensors", "progress.json"])
def test_a_damaged_checkpoint_is_named_and_not_used(quick, tmp_path, file):
    assert train.main([*quick, "--steps=4"]) == 0
    damaged = tmp_path / "run" / "last" / file
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"last/{file} was truncated or altered"):
        train.main([*quick, "--steps=4", "--resume"])


def test_a_failed_start_leaves_no_directory(quick, tmp_path):
    with pytest.raises(UserError):
        train.main([*quick, "--data=/nowhere/at/all"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sampling", ["joint", "round-robin", "shuffled"])
def test_every_way_of_sampling_trains_every_task(quick, tmp_path, sampling):
    assert train.main([*quick, "--surgery=sum", f"--sampling={sampling}"]) == 0
    records = [r for r in Run(tmp_path / "run").metrics.records() if "loss" in r]
    tasks_per_step = {len(record["loss"]) for record in records}
    assert tasks_per_step == ({3} if sampling == "joint" else {1})
    assert len(records) == (12 if sampling == "joint" else 36)
    counts = {name: sum(name in r["loss"] for r in records) for name in ("sst", "qqp", "sts")}
    assert set(counts.values()) == {12}


def test_epoch_length_and_steps(quick, tmp_path):
    assert train.main([*quick, "--epoch-length=3", "--steps=7"]) == 0
    evaluated = [(r["step"], r["epoch"]) for r in Run(tmp_path / "run").metrics.records() if "dev" in r]
    assert evaluated == [(3, 1), (6, 2), (7, 3)]


def test_pretrain_mode_trains_the_heads_alone(quick, tmp_path):
    assert train.main([*quick, "--mode=pretrain", "--steps=3"]) == 0
    assert train.main([*quick, "--mode=pretrain", "--steps=6", f"--out={tmp_path / 'longer'}"]) == 0
    short, longer = (load_file(run / "last" / "model.safetensors") for run in (tmp_path / "run", tmp_path / "longer"))
    assert all(torch.equal(short[name], longer[name]) for name in short)
    heads = [load_file(run / "last" / "heads.safetensors") for run in (tmp_path / "run", tmp_path / "longer")]
    assert all(not torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_bf16_trains_and_rounds_as_bf16_does(quick, tmp_path):
    """Moments after one step are gradients times a constant: those of bf16 lie apart from float32's by its rounding."""
    moments = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert train.main([*quick, f"--precision={precision}", "--steps=1", f"--out={out}"]) == 0
        assert Run(out).summary()["precision"] == precision
        state = load_file(out / "last" / "optimizer.safetensors")
        moments[precision] = torch.cat([x.flatten() for name, x in state.items() if name.endswith("exp_avg")])
    apart = float((moments["bf16"] - moments["fp32"]).norm() / moments["fp32"].norm())
    # A hundred times what float32 rounds by would not be half as much.
    assert 200 * torch.finfo(torch.float32).eps < apart < bf16_bound(layers=1)
    assert train.main([*quick, "--precision=bf16"]) == 0
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", None])
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, feature):
    features = dict.fromkeys(kernels.native.cpu_features(), True) | {"avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(kernels.native, "cpu_features", lambda: features | ({feature: True} if feature else {}))
    assert resolve_precision("auto", torch.device("cpu")) == ("bf16" if feature else "fp32")
    for named in ("fp32", "bf16"):
        assert resolve_precision(named, torch.device("cpu")) == named


def poison(monkeypatch, value: float, calls: set[int] | None = None) -> None:
    """Have the objective return a total of `value`: always, or at its n-th calls."""
    real, count = Objective.__call__, itertools.count()

    def poisoned(self, *arguments, **options):
        losses = real(self, *arguments, **options)
        hit = next(count) in calls if calls else True
        return dataclasses.replace(losses, total=losses.total * value) if hit else losses

    monkeypatch.setattr(Objective, "__call__", poisoned)


def test_a_non_finite_gradient_skips_the_step_and_is_counted(quick, tmp_path, monkeypatch):
    poison(monkeypatch, float("nan"), {3})
    assert train.main(quick) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_too_many_non_finite_steps_end_the_run_with_advice(quick, tmp_path, monkeypatch):
    poison(monkeypatch, float("inf"))
    with pytest.raises(UserError, match=r"3 steps in a row.*--lr"):
        train.main([*quick, "--max-skipped=3"])


def test_a_full_disk_keeps_the_last_checkpoint(quick, tmp_path, monkeypatch):
    real = checkpoint.write_tensors
    calls = []

    def full(path, tensors):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match=r"no room left on the disk.*--resume"):
        train.main(quick)
    verify(tmp_path / "run" / "last")
    assert json.loads((tmp_path / "run" / "last" / "progress.json").read_text())["step"] == 4


def test_dropout_is_the_models_own_or_what_the_option_says(quick, tmp_path):
    assert train.main([*quick, "--steps=1", "--dropout=0.3"]) == 0
    config = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert (config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]) == (0.3, 0.3)
    from_it = [*quick, "--steps=1", f"--model={tmp_path / 'run' / 'last'}"]
    for option, expected in (([], 0.3), (["--dropout=0"], 0.0)):
        out = tmp_path / f"dropout {expected}"
        assert train.main([*from_it, *option, f"--out={out}"]) == 0
        assert json.loads((out / "last" / "config.json").read_text())["hidden_dropout_prob"] == expected


def test_tasks_of_the_data_that_are_not_trained_are_named(quick, capsys):
    assert train.main([*quick, "--steps=1", "--tasks=sst"]) == 0
    assert "not trained: qqp, sts (--tasks chooses)" in capsys.readouterr().out


def test_nothing_is_named_where_all_tasks_are_trained(quick, capsys):
    assert train.main([*quick, "--steps=1"]) == 0
    assert "not trained" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--surgery-groups=sst+qqp,sts", "--surgery-reduction=mean"])
def test_options_of_surgery_that_do_nothing_are_told(option, quick, capsys):
    assert train.main([*quick, "--recipe=plain", "--steps=1", option, "--surgery=sum"]) == 0
    name = option.partition("=")[0]
    assert f"warning: {name} does nothing with --surgery sum" in " ".join(capsys.readouterr().out.split())
