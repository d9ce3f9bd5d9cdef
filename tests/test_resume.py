"""Resuming: which options come from the record, which may change, and how far a run can be extended."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from compare_runs import assert_equal_runs
from groups import quick_options

from minbert import train
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.methods.smart import SmartConfig
from minbert.runs.resume import (
    CHOSEN_AT_START,
    LENGTH,
    ROUNDING,
    WITHOUT_EFFECT,
    check_length,
    deciding,
    departures,
    differences,
    flat,
    remarks,
    resumed,
)
from minbert.runs.run_directory import Run

# fmt: off
FIXED = [
    "tasks", "model", "folds", "fold", "batch_size", "lr", "head_lr", "layer_decay", "seed", "precision", "mode",
    "freeze_layers", "surgery", "surgery_reduction", "surgery_scope", "surgery_groups", "low_memory", "accumulate",
    "cuda_graphs", "loss_weights", "optimizers", "sampling", "sampling_alpha", "sampling_alpha_end", "sampling_weights",
    "epoch_length", "epoch_times", "swap_pairs", "reviews_per_star", "heads", "losses", "l2", "label_smoothing",
    "shared_layer", "pooling", "max_length", "dropout", "head_dropout", "schedule", "warmup", "weight_decay",
    "adam_eps", "clip_norm", "smart.lambda_s", "smart.epsilon", "smart.sigma", "smart.eta", "smart.steps", "smart.norm",
    "smart.per", "smart.projection", "smart.relative", "smart.masks", "smart.warmup", "smart.precision", "smart.noise",
    "smart.normalized", "smart.search", "smart.objective", "rdrop.alpha", "bregman.mu", "bregman.beta",
    "scratch.vocab_size", "scratch.hidden_size", "scratch.num_hidden_layers",
    "scratch.num_attention_heads", "scratch.intermediate_size",
]
# fmt: on


def test_every_option_is_classified():
    """A new option is fixed, unless a table of minbert/runs/resume.py says why it may change."""
    classes = [*WITHOUT_EFFECT, *ROUNDING, *LENGTH, *FIXED]
    assert len(classes) == len(set(classes))
    assert {name for name, _ in flat(TrainConfig())} == set(classes)
    assert set(CHOSEN_AT_START) <= set(FIXED)


CHANGED = {  # another value of each option that is not a number or a flag
    "tasks": ["sst"],
    "model": "elsewhere",
    "folds": 5,
    "head_lr": 0.5,
    "precision": "fp32",
    "mode": "pretrain",
    "surgery": "mean",
    "surgery_reduction": "mean",
    "surgery_scope": "layer",
    "surgery_groups": ["sst+qqp", "sts"],
    "loss_weights": {"sst": 2.0},
    "epoch_length": "largest",
    "swap_pairs": ["sts"],
    "heads": {"sts": "cosine"},
    "losses": {"sst": "cross_entropy"},
    "shared_layer": "linear",
    "pooling": "mean",
    "dropout": 0.5,
    "schedule": "constant",
    "smart.norm": "2",
    "smart.per": "sequence",
    "smart.projection": "unit",
    "smart.masks": "independent",
    "smart.precision": "same",
    "smart.noise": "uniform",
    "smart.search": "power",
    "smart.objective": "kl",
}
SEVERAL = {  # options that ask for others
    "fold": {"folds": 5, "fold": 2},
    "optimizers": {"optimizers": "per-task", "sampling": "shuffled", "surgery": "sum"},
    "sampling": {"sampling": "shuffled", "surgery": "sum"},
    "sampling_alpha": {"sampling_alpha": 0.5, "sampling": "proportional", "surgery": "sum"},
    "sampling_alpha_end": {"sampling_alpha_end": 0.5, "sampling": "proportional", "surgery": "sum"},
    "sampling_weights": {"sampling_weights": {"sst": 2.0}, "sampling": "shuffled", "surgery": "sum"},
}
BEGUN = TrainConfig(tasks=["sst", "qqp", "sts"], lr=0.001, precision="bf16", max_length=512, out="runs/x")


def another(value: float) -> float:
    if isinstance(value, bool):
        return not value
    return 2 * value + 1 if isinstance(value, int) else (value or 0.5) / 2


@pytest.mark.parametrize("name", FIXED)
def test_what_decides_the_weights_may_not_change(name):
    record, _, nested = name.rpartition(".")
    own = getattr(BEGUN, record) if record else BEGUN
    value = getattr(own, nested)
    changes = SEVERAL.get(name) or {nested: CHANGED[name] if name in CHANGED else another(value)}
    given = BEGUN.replace(**({record: dataclasses.replace(own, **changes)} if record else changes))
    with pytest.raises(UserError, match=rf"runs/x was started with other options: .*--{name.replace('_', '-')} \(was "):
        resumed(BEGUN, given, Path("runs/x"))
    assert name in differences(BEGUN, given)
    assert name == "seed" or name in departures(deciding(BEGUN), given)


def test_what_was_left_open_is_as_the_record_has_it():
    saved = BEGUN.replace(data="d", reviews="r", augmented={"sst": "a"}, threads=2, backend="reference")
    found = resumed(saved, TrainConfig(out="runs/x"), Path("runs/x"))
    assert found == saved


def test_what_was_raised_for_smart_goes_on_as_it_was_begun():
    begun = BEGUN.replace(smart=SmartConfig(lambda_s=1.0))
    raised = begun.replace(precision="fp32")
    assert resumed(raised, begun, Path("x")).precision == "fp32"
    assert differences(raised, begun) == departures(deciding(raised), begun.replace(precision="bf16")) == {}
    same = raised.replace(smart=SmartConfig(lambda_s=1.0, precision="same"))
    with pytest.raises(UserError, match="--precision"):
        resumed(same, same.replace(precision="bf16"), Path("x"))


def test_a_recorded_run_is_the_same_on_another_machine_and_may_not_differ_in_length():
    begun = BEGUN.replace(data="/here/data", model="/here/minilm", augmented={"sst": "/here/more.tsv"}, out="/here/x")
    elsewhere = begun.replace(
        data="data", model="there/minilm", augmented={"sst": "more.tsv"}, out="y", threads=7, seed=9
    )
    recorded = json.loads(json.dumps(deciding(begun)))
    assert departures(recorded, elsewhere) == {}
    assert departures(recorded, elsewhere.replace(precision="auto", lr=None, max_length=None)) == {}
    assert departures(recorded, elsewhere.replace(model="there/base")) == {"model": "--model (was minilm, is base)"}
    assert departures(recorded, elsewhere.replace(epochs=7)) == {"epochs": f"--epochs (was {begun.epochs}, is 7)"}


def test_a_run_with_a_former_default_keeps_it_and_says_so():
    begun = BEGUN.replace(smart=SmartConfig(lambda_s=1.0))
    assert resumed(begun, BEGUN, Path("x")).smart.lambda_s == 1.0
    assert remarks(begun, BEGUN) == ["the run goes on with --smart.lambda-s 1.0, the default when it was begun"]
    with pytest.raises(UserError, match=r"--smart.lambda-s \(was 2.0, is 0.0\)"):
        resumed(begun.replace(smart=SmartConfig(lambda_s=2.0)), BEGUN, Path("x"))


def test_a_place_may_be_spelt_otherwise(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    saved = BEGUN.replace(model="model")
    for other in ("./model", f"{tmp_path}/model/"):
        assert differences(saved, BEGUN.replace(model=other)) == {}
        assert resumed(saved, BEGUN.replace(model=other), Path("x")).model == other


def test_a_run_goes_on_with_other_options_that_change_no_result(course_data, quick, tmp_path, capsys):
    assert train.main([*quick, "--dropout=0.1"]) == 0
    moved = shutil.copytree(course_data, tmp_path / "moved")
    again = tmp_path / "again"
    assert train.main([*quick_options(course_data, again), "--dropout=0.1", "--steps=7"]) == 0
    summary = Run(again).summary()
    options = [f"--data={moved}", "--log-steps=3", "--checkpoint-steps=100", "--timeout=60", "--max-skipped=2"]
    options += [f"--out={again}/../again", "--device=cpu", "--epochs=1", "--steps=12"]
    assert train.main([*quick, "--dropout=0.1", *options, "--resume"]) == 0
    found = Run(again).config()
    assert (found.data, found.log_steps, found.steps) == (str(moved), 3, 12)
    assert [r["step"] for r in Run(again).metrics.records() if "loss" in r] == [1, 2, 3, 4, 5, 6, 7, 9, 12]
    assert Run(again).summary()["steps"] == 12 > summary["steps"]
    shown = capsys.readouterr().out
    assert "7 steps were planned, and now 12: from step 8 on the learning rate follows the schedule of 12" in shown
    assert "sums may round" not in shown


def test_other_arithmetic_is_said(quick, tmp_path, capsys):
    assert train.main([*quick, "--steps=2", "--threads=1"]) == 0
    assert train.main([*quick, "--steps=3", "--threads=2", "--backend=reference", "--resume"]) == 0
    line = "--threads (was 1, is 2), --backend (was auto, is reference): sums may round differently"
    assert line in capsys.readouterr().out


def test_data_that_moved_and_changed_is_refused(course_data, quick, tmp_path):
    assert train.main([*quick, "--steps=2"]) == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    moved = shutil.copytree(course_data, tmp_path / "moved")
    text = (moved / "ids-sst-train.csv").read_text()
    (moved / "ids-sst-train.csv").write_text(text.replace("film", "play"))
    with pytest.raises(UserError, match="data of sst"):
        train.main([*quick, "--steps=3", f"--data={moved}", "--resume"])
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


PER_TASK = ["--surgery=sum", "--optimizers=per-task"]
CONSTANT = ["--schedule=constant", "--warmup=0", "--dropout=0.1"]


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        (CONSTANT, ["--epochs=1"], ["--epochs=2"]),
        ([*CONSTANT, "--surgery=sum", "--sampling=shuffled"], ["--epochs=1"], ["--epochs=2"]),
        (
            [*CONSTANT, "--surgery=sum", "--sampling=proportional", "--optimizers=per-task"],
            ["--steps=5"],
            ["--steps=11"],
        ),
    ],
)
def test_a_run_that_is_extended_equals_a_longer_one(quick, tmp_path, options, first, last, capsys):
    straight = ["--out", str(tmp_path / "straight")]
    assert train.main([*quick, *options, *last, *straight]) == 0
    assert train.main([*quick, *options, *first]) == 0
    capsys.readouterr()
    assert train.main([*quick, *options, *last, "--resume"]) == 0
    assert "steps were planned, and now" in capsys.readouterr().out
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")
    one, other = (Run(tmp_path / name).summary() for name in ("straight", "run"))
    assert one["steps"] == other["steps"]
    if first == ["--epochs=1"]:
        assert one["dev"] == other["dev"]


def test_an_epoch_scored_in_its_middle_keeps_its_better_scores(quick, tmp_path):
    options = [*quick, "--epoch-length=3", "--smart.lambda-s=0"]
    totals = iter([0.5, 0.7, 0.6, 0.4])  # of steps 3, 4, 6 and 7
    with (
        patch("minbert.training.training_run.overall", lambda scores, tasks: scores["sst"]["accuracy"]),
        patch("minbert.training.training_run.evaluate", lambda *_, **kw: ({"sst": {"accuracy": next(totals)}}, {})),
        patch("minbert.training.training_run.TrainingRun.finish"),
    ):
        assert train.main([*options, "--steps=4"]) == 0
        assert train.main([*options, "--steps=7", "--resume"]) == 0
    progress = json.loads((tmp_path / "run" / "last" / "progress.json").read_text())
    assert [scores["sst"]["accuracy"] for scores in progress["dev"]] == [0.5, 0.7, 0.4]
    assert (progress["best_epoch"], progress["best_overall"]) == (2, 0.7)
    assert json.loads((tmp_path / "run" / "best" / "progress.json").read_text())["step"] == 4


def test_fewer_steps_than_were_taken_are_refused(quick, tmp_path):
    assert train.main([*quick, "--steps=5"]) == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="has taken 5 steps, more than the 4 asked for; give more --epochs or --steps"):
        train.main([*quick, "--steps=4", "--resume"])
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_what_is_spread_over_all_epochs_cannot_be_extended():
    config = TrainConfig(out="x", sampling="proportional", surgery="sum", sampling_alpha_end=0.2)
    assert check_length(config, 8, 8, 4) == []
    with pytest.raises(UserError, match="--sampling-alpha-end"):
        check_length(config, 8, 12, 4)


def test_precision_is_not_decided_again(quick, tmp_path, monkeypatch):
    """Trained weights may say otherwise of SMART's radius than those that the run began with."""
    auto = [option for option in quick if not option.startswith("--precision")]
    decisions = []

    def decide(*arguments):
        decisions.append(arguments)
        return "fp32"

    monkeypatch.setattr(
        "minbert.training.loop.resolve_precision", lambda name, *rest: "fp32" if name == "auto" else name
    )
    monkeypatch.setattr("minbert.training.loop.fit_for_smart", decide)
    assert train.main([*auto, "--steps=2"]) == 0
    assert len(decisions) == 1
    monkeypatch.setattr(
        "minbert.training.loop.resolve_precision", lambda name, *rest: "bf16" if name == "auto" else name
    )
    assert train.main([*auto, "--steps=3", "--resume"]) == 0
    assert len(decisions) == 1
    assert Run(tmp_path / "run").config().precision == "fp32"


# Directories in which a run was begun ------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("fails_in", ["prepare", "restore", "stepper", "save"])
def test_what_fails_before_the_first_checkpoint_can_be_begun_again(quick, tmp_path, monkeypatch, fails_in, resume):
    def fail(*arguments, **options):
        raise RuntimeError("a fault")

    names = {
        "prepare": "minbert.training.loop.build_model",
        "restore": "minbert.training.training_run.TrainingRun.restore",
        "stepper": "minbert.training.loop.training_step",
        "save": "minbert.runs.checkpoint.write_directory",
    }
    with patch(names[fails_in], fail), pytest.raises(RuntimeError, match="a fault"):
        train.main([*quick, "--steps=2"])
    if fails_in in ("prepare", "restore"):
        assert not (tmp_path / "run").exists()
        resume = []
    assert train.main([*quick, "--steps=2", "--lr=0.002", *resume]) == 0
    assert Run(tmp_path / "run").config().lr == 0.002
    assert [r["step"] for r in Run(tmp_path / "run").metrics.records() if "loss" in r] == [1, 2]


@pytest.mark.parametrize("left", [[".lock"], [".lock", ".config.yaml.tmp"]])
def test_what_a_killed_start_leaves_does_not_refuse_the_next(quick, tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    assert train.main([*quick, "--steps=1"]) == 0


def test_a_directory_of_other_things_is_refused_and_left_as_it_is(quick, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("database: mine\n")
    for name, said in (("config.yaml", "config.yaml"), ("notes.txt", "is not empty")):
        with pytest.raises(UserError, match=said):
            train.main(quick)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
        (tmp_path / "run" / "config.yaml").rename(tmp_path / "run" / "notes.txt") if name == "config.yaml" else None
    assert (tmp_path / "run" / "notes.txt").read_text() == "database: mine\n"


def test_a_summary_does_not_outlive_the_run_that_it_sums_up(quick, tmp_path):
    assert train.main([*quick, "--steps=2"]) == 0
    with (
        patch("minbert.training.training_run.TrainingRun.finish", side_effect=RuntimeError("a fault")),
        pytest.raises(RuntimeError),
    ):
        train.main([*quick, "--steps=3", "--resume"])
    assert Run(tmp_path / "run").summary() == {}
    assert train.main([*quick, "--steps=3", "--resume"]) == 0
    assert Run(tmp_path / "run").summary()["steps"] == 3
