"""Runs with SMART, surgery and the rest: what must equal plain training does, and what is watched is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compare_runs import assert_close_in_bf16, assert_equal, interrupted, weights
from groups import drawing
from safetensors.torch import load_file

from minbert import train
from minbert.errors import UserError
from minbert.runs.run_directory import Run

PLAIN = ["--surgery=sum", "--smart.lambda-s=0"]
NO_DROPOUT = ["--dropout=0", "--head-dropout=0"]
PAIRS_APART = ["--heads.qqp=difference", "--heads.sts=concatenated-layers-cosine", "--shared-layer=transform"]
PAIRS_APART += ["--losses.qqp=multiple_negatives_ranking", "--pooling.sts=mean", "--l2.sts=0.1", "--heads.sst=layers"]
EVERYTHING = ["--recipe=smart-gse", "--bregman.mu=0.5", "--accumulate=2", "--batch-size=4"]
in_both = pytest.mark.parametrize("precision", ["--precision=fp32", "--precision=bf16"])
APART = [*PAIRS_APART, "--shared-layer=linear", "--losses.qqp=binary_cross_entropy"]


@pytest.fixture
def weights_of(quick, tmp_path):
    """`weights_of(options)`: the final weights of a run with them."""
    runs = iter(range(100))

    def run(*options: str) -> dict[str, torch.Tensor]:
        out = tmp_path / f"run{next(runs)}"
        assert train.main([*quick, f"--out={out}", *options]) == 0
        return weights(out)

    return run


def assert_near(one, other, start):
    """Alike to a small share of how far training went; key biases have a gradient of 0, whose noise AdamW enlarges."""
    for name in one:
        if name.endswith("key.bias"):
            continue
        far = (other[name] - start[name]).abs().max()
        assert (one[name] - other[name]).abs().max() <= 0.01 * far + 1e-6, name


@in_both
def test_smart_that_moves_nothing_is_plain_training_to_the_bit(weights_of, precision):
    still = weights_of(precision, "--surgery=sum", "--smart.lambda-s=3", "--smart.sigma=0", "--smart.eta=0")
    assert_equal(weights_of(precision, *PLAIN), still)


@in_both
def test_a_teacher_that_is_the_model_itself_is_plain_training_to_the_bit(weights_of, precision):
    assert_equal(weights_of(precision, *PLAIN), weights_of(precision, *PLAIN, "--bregman.mu=2", "--bregman.beta=0"))


@in_both
@pytest.mark.parametrize("smart", [0, 1])
def test_all_surgeries_on_one_task_are_the_plain_update_to_the_bit(weights_of, smart, precision):
    options = [precision, "--tasks=sst", "--steps=4", f"--smart.lambda-s={smart}"]
    plain = weights_of(*options, "--surgery=sum")
    for surgery in ("mean", "pcgrad"):
        assert_equal(plain, weights_of(*options, f"--surgery={surgery}"))
    assert_equal(plain, weights_of(*options, "--surgery=pcgrad", "--surgery-reduction=mean"))


def test_smart_and_pcgrad_change_the_weights(weights_of):
    plain = weights_of(*PLAIN)
    for recipe in ("smart", "pcgrad", "smart-pcgrad", "gse", "smart-gse", "r3f", "rdrop", "sift", "freelb", "vat"):
        other = weights_of(f"--recipe={recipe}")
        assert any(not torch.equal(plain[name], other[name]) for name in plain), recipe


@pytest.mark.parametrize("heads", [[], APART])
@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
def test_task_after_task_trains_like_one_stream(weights_of, surgery, heads):
    """Without SMART's noise and dropout, which follow the place in the stream."""
    options = ["--smart.lambda-s=0", f"--surgery={surgery}", *NO_DROPOUT, *heads]
    start = weights_of(*options, "--steps=1", "--lr=1e-12")
    assert_near(weights_of(*options, "--low-memory"), weights_of(*options), start)


def test_two_half_batches_train_like_a_whole_one(weights_of):
    options = ["--smart.lambda-s=0", *NO_DROPOUT]
    start = weights_of(*options, "--steps=1", "--lr=1e-12")
    assert_near(weights_of(*options, "--batch-size=4", "--accumulate=2"), weights_of(*options, "--batch-size=8"), start)


@pytest.mark.parametrize("heads", [[], APART])
@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
def test_in_bf16_other_streams_give_the_gradients_of_one_to_its_rounding(quick, tmp_path, surgery, heads):
    """Task after task, or two half batches where none is normalised; a task that counts for a tenth less would show."""
    options = [
        *quick,
        "--precision=bf16",
        "--steps=1",
        "--smart.lambda-s=0",
        f"--surgery={surgery}",
        *NO_DROPOUT,
        *heads,
    ]
    others = {
        "low-memory": ["--low-memory"],
        "halves": ["--batch-size=4", "--accumulate=2"],
        "less": ["--loss-weights={sst: 0.9}"],
    }
    for name, more in {"one": [], **others}.items():
        assert train.main([*options, *more, f"--out={tmp_path / name}"]) == 0
    for name in ("low-memory",) if heads else ("low-memory", "halves"):
        assert_close_in_bf16(tmp_path / "one", tmp_path / name, layers=1)
    with pytest.raises(AssertionError):
        assert_close_in_bf16(tmp_path / "one", tmp_path / "less", layers=1)


def test_gse_updates_twice_in_a_step(quick, tmp_path):
    assert train.main([*quick, "--recipe=gse", "--steps=3"]) == 0
    state = load_file(tmp_path / "run" / "last" / "optimizer.safetensors")
    assert {value.item() for name, value in state.items() if name.endswith(".step")} == {6.0}


@in_both
@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING,
        ["--low-memory", "--surgery-groups=qqp+sts,sst", "--smart.steps=2"],
        [*EVERYTHING, *PAIRS_APART],
        [*PAIRS_APART, "--low-memory", "--surgery-groups=qqp+sts,sst", "--heads.sts=layers-cosine"],
        ["--recipe=freelb", "--surgery=gse", "--bregman.mu=0.5", "--accumulate=2", "--batch-size=4"],
        ["--recipe=sift", "--surgery=pcgrad", "--rdrop.alpha.sts=2", "--dropout=0.1", "--low-memory"],
        ["--recipe=vat", "--smart.lambda-s=0", "--smart.lambda-s.sst=5", "--smart.noise=uniform", "--surgery=pcgrad"],
    ],
)
def test_everything_at_once_repeats_itself_and_resumes_to_the_bit(weights_of, quick, tmp_path, options, precision):
    options = [precision, *options]
    straight = weights_of(*options)
    with interrupted("minbert.training.loop.training_step", 6):
        train.main([*quick, *options])
    assert train.main([*quick, *options, "--resume"]) == 0
    assert_equal(straight, weights(tmp_path / "run"))


def records(run: Path) -> list[dict]:
    return [record for record in Run(run).metrics.records() if "loss" in record]


def test_what_is_watched_is_written_down(quick, tmp_path):
    with drawing():
        assert train.main([*quick, "--bregman.mu=1"]) == 0
    first = records(tmp_path / "run")[0]
    pairs = {"sst/qqp", "sst/sts", "qqp/sts"}
    assert first["cosine"].keys() == first["magnitude_similarity"].keys() == pairs
    assert all(-1 <= value <= 1 for value in first["cosine"].values())
    assert all(0 <= value <= 1 for value in first["magnitude_similarity"].values())
    assert first["smart"].keys() == first["bregman"].keys() == {"sst", "qqp", "sts"}
    assert 0 < first["smart_share"] < 1
    assert first["perturbation"] > 0
    assert first["projected_share"] >= 0
    assert first["seconds"].keys() == {"batch", "forward", "smart", "bregman", "backward", "update"}
    evaluated = [record for record in Run(tmp_path / "run").metrics.records() if "dev" in record]
    assert all(0 <= rate <= 1 for record in evaluated for rate in record["conflict_rate"].values())
    plots = {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    assert plots == {"curves.png", "timing.png", "conflicts.png"}


def test_a_plain_run_watches_no_conflicts(quick, tmp_path):
    with drawing():
        assert train.main([*quick, *PLAIN]) == 0
    assert not {"cosine", "smart", "bregman"} & records(tmp_path / "run")[0].keys()
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == {"curves.png", "timing.png"}


def test_groups_of_tasks_share_a_gradient(quick, tmp_path):
    assert train.main([*quick, "--steps=2", "--surgery-groups=sst+qqp,sts"]) == 0
    assert records(tmp_path / "run")[0]["cosine"].keys() == {"sst+qqp/sts"}


def test_torchjds_weightings_work_as_they_are(quick, tmp_path):
    pytest.importorskip("torchjd", reason="needs torchjd, of the extra [bench]")
    assert train.main([*quick, "--steps=3", "--surgery=torchjd.aggregation:PCGradWeighting"]) == 0
    assert records(tmp_path / "run")[0]["cosine"]


def test_smart_that_does_nothing_is_said_once(quick, capsys):
    assert train.main([*quick, "--smart.epsilon=1e-5", "--smart.sigma=1e-5", "--smart.eta=1e-5"]) == 0
    assert capsys.readouterr().out.count("warning: SMART's regulariser was") == 1


def test_bf16_that_rounds_the_perturbation_away_gives_way_to_fp32(quick, tmp_path, capsys):
    small = ["--precision=bf16", "--smart.epsilon=1e-4", "--steps=1"]
    assert train.main([*quick, *small]) == 0
    assert "the steps run in fp32" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["precision"] == "fp32"
    assert train.main([*quick, *small, "--smart.precision=same", f"--out={tmp_path / 'same'}"]) == 0
    assert "SMART will do nothing" in capsys.readouterr().out
    assert json.loads((tmp_path / "same" / "summary.json").read_text())["precision"] == "bf16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--surgery=pcgard"], r"--surgery pcgard: unknown \(did you mean 'pcgrad'\?\); expected sum, mean"),
        (["--surgery=no.such:thing"], r"--surgery no.such:thing: cannot be loaded \(No module named 'no'\)"),
        (["--surgery=math:pi"], "--surgery math:pi: expected a callable from Gram matrix to weights, got 3.14"),
        (["--surgery=torch:linalg.no"], "--surgery torch:linalg.no: cannot be loaded"),
        (
            ["--surgery=torch:linalg.inv"],
            r"--surgery torch:linalg.inv: must return a tensor of 3 weights, got \[3, 3\]",
        ),
        (
            ["--surgery=torch:diag_embed"],
            r"--surgery torch:diag_embed: must return a tensor of 3 weights, got \[3, 3, 3\]",
        ),
        (["--surgery=math:floor"], r"--surgery math:floor: raised \w+: .*, for a Gram matrix \[3, 3\]"),
        (["--surgery=builtins:len"], "--surgery builtins:len: must return a tensor of 3 weights, got int"),
        (["--sampling=round-robin"], "--surgery pcgrad needs a batch of every task .* give --surgery sum"),
        (
            ["--surgery-groups=sst+qqp"],
            r"--surgery-groups must hold each of the tasks sst, qqp, sts once.* got sst\+qqp",
        ),
        (["--smart.epsilon=-1"], r"--smart.epsilon must be 0 or more, got -1"),
        (["--bregman.beta=2"], r"--bregman.beta must be between 0 and 1, got 2"),
        (["--accumulate=0"], "--accumulate must be at least 1, got 0"),
        (["--smart.norm=3"], r"--smart.norm: expected one of 'inf', '2', got '3'"),
        (["--smart.lambda-s=much"], r"--smart.lambda-s: expected float or dict\[str, float\], got 'much'"),
        (["--smart.nrom=2"], r"unknown option --smart.nrom \(did you mean '--smart.norm'\?\)"),
    ],
)
def test_bad_options_are_named(quick, options, message):
    with pytest.raises(UserError, match=message):
        train.main([*quick, *options])
