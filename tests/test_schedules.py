"""Runs by every schedule: what is trained when, and with what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minbert import train
from minbert.errors import UserError
from minbert.runs import checkpoint
from minbert.runs.run_directory import Run

ONE_AT_A_TIME = ["sequential", "round-robin", "shuffled", "proportional"]
PLAIN = ["--surgery=sum", "--smart.lambda-s=0"]


def saved(run: Path) -> dict[str, torch.Tensor]:
    names = ("model", "heads", "optimizer")
    return {
        f"{name}/{key}": value for name in names for key, value in load_file(run / f"last/{name}.safetensors").items()
    }


def losses(run: Path) -> list[dict[str, float]]:
    return [record["loss"] for record in Run(run).metrics.records() if "loss" in record]


def assert_same(one: Path, other: Path) -> None:
    first, second = saved(one), saved(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("optimizers", ["shared", "per-task"])
@pytest.mark.parametrize("sampling", ONE_AT_A_TIME)
def test_a_run_that_is_stopped_goes_on_to_the_same_weights_and_moments(
    quick, tmp_path, monkeypatch, sampling, optimizers
):
    options = [*quick, "--surgery=sum", f"--sampling={sampling}", f"--optimizers={optimizers}", "--steps=11"]
    options += [
        "--bregman.mu=0.5",
        "--accumulate=2",
        "--batch-size=3",
        "--epoch-length=2",
        "--sampling-weights={sst: 2}",
    ]
    assert train.main([*options, f"--out={tmp_path / 'straight'}"]) == 0

    real = checkpoint.save

    def stop_after(path, model, tokenizer, optimizer, progress, *rest):
        real(path, model, tokenizer, optimizer, progress, *rest)
        if progress.step == 4:
            raise train.Stopped(2)

    monkeypatch.setattr(checkpoint, "save", stop_after)
    assert train.main(options) == 130
    monkeypatch.setattr(checkpoint, "save", real)
    assert train.main([*options, "--resume"]) == 0
    assert_same(tmp_path / "straight", tmp_path / "run")
    assert losses(tmp_path / "straight") == losses(tmp_path / "run")


def test_an_update_of_accumulated_batches_is_of_one_task(quick, tmp_path):
    assert train.main([*quick, *PLAIN, "--sampling=round-robin", "--accumulate=2", "--batch-size=4", "--steps=4"]) == 0
    assert [list(loss) for loss in losses(tmp_path / "run")] == [["sst"], ["qqp"], ["sts"], ["sst"]]


def test_tasks_come_in_the_order_they_are_named_in(quick, tmp_path):
    options = [*quick, *PLAIN, "--sampling=sequential", "--tasks=qqp,sts,sst", "--epoch-length=2", "--steps=6"]
    assert train.main(options) == 0
    assert [*map(list, losses(tmp_path / "run"))] == [["qqp"], ["qqp"], ["sts"], ["sts"], ["sst"], ["sst"]]


def test_with_optimizers_of_its_own_a_task_trains_as_if_there_were_no_other(quick, tmp_path):
    """Learning rate, moments and step counts of the first task are those of a run of it alone; the next start anew."""
    assert train.main([*quick, "--steps=1"]) == 0
    options = [*quick, *PLAIN, f"--model={tmp_path / 'run/last'}", "--lr=1e-3", "--epoch-length=4", "--epochs=1"]
    options += ["--sampling=sequential", "--optimizers=per-task"]
    assert train.main([*options, "--tasks=sst", f"--out={tmp_path / 'alone'}"]) == 0
    assert train.main([*options, "--tasks=sst,sts", f"--out={tmp_path / 'both'}"]) == 0
    assert losses(tmp_path / "both")[:4] == losses(tmp_path / "alone")
    rates = [record["lr"] for record in Run(tmp_path / "both").metrics.records() if "loss" in record]
    assert rates[:4] == rates[4:] == sorted(rates[:4], reverse=True)
    state = load_file(tmp_path / "both/last/optimizer.safetensors")
    alone = load_file(tmp_path / "alone/last/optimizer.safetensors")
    assert alone.keys() == {name for name in state if name.endswith("@sst")}
    assert all(torch.equal(alone[name], state[name]) for name in alone)
    assert {state[name].item() for name in state if ".step@" in name} == {4}


def test_the_heads_learn_at_a_rate_of_their_own(quick, tmp_path):
    """A share r of the encoder's rate in one AdamW step moves the heads r times as far."""
    common = [*quick, *PLAIN, "--steps=1", "--warmup=0", "--weight-decay=0", "--schedule=constant"]
    for name, rate in (("start", "1e-30"), ("slow", "1e-3"), ("fast", "4e-3")):
        assert train.main([*common, "--lr=1e-3", f"--head-lr={rate}", f"--out={tmp_path / name}"]) == 0
    start, slow, fast = (saved(tmp_path / name) for name in ("start", "slow", "fast"))
    for key in start:
        if key.startswith("model/"):
            assert torch.equal(slow[key], fast[key])
        if key.startswith("heads/"):
            torch.testing.assert_close(fast[key] - start[key], 4 * (slow[key] - start[key]), rtol=1e-4, atol=1e-7)


def test_the_heads_learn_at_the_encoders_rate_unless_told(quick, tmp_path):
    assert train.main([*quick, *PLAIN, "--steps=2", "--lr=1e-3"]) == 0
    out = tmp_path / "told"
    assert train.main([*quick, *PLAIN, "--steps=2", "--lr=1e-3", "--head-lr=1e-3", f"--out={out}"]) == 0
    assert_same(tmp_path / "run", out)


@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
def test_loss_weights_of_one_change_nothing_and_others_do(quick, tmp_path, surgery):
    runs = {}
    for name, weights in (("plain", "{}"), ("ones", "{sst: 1, sts: 1}"), ("twos", "{sst: 2}")):
        runs[name] = tmp_path / name
        options = [f"--surgery={surgery}", "--steps=3", f"--loss-weights={weights}", f"--out={runs[name]}"]
        assert train.main([*quick, *options]) == 0
    assert_same(runs["plain"], runs["ones"])
    assert losses(runs["plain"])[0] == losses(runs["twos"])[0]  # what is shown is the loss itself
    assert losses(runs["plain"])[1] != losses(runs["twos"])[1]


def test_a_weight_on_every_loss_is_a_weight_on_the_gradient(quick, tmp_path):
    options = [*quick, *PLAIN, "--steps=1"]
    assert train.main(options) == 0
    assert train.main([*options, "--loss-weights={sst: 4, qqp: 4, sts: 4}", f"--out={tmp_path / 'four'}"]) == 0
    one, four = (Run(tmp_path / name).metrics.records()[0]["grad_norm"] for name in ("run", "four"))
    assert four == pytest.approx(4 * one, rel=1e-6)


def test_a_batch_size_for_each_task(quick, tmp_path):
    options = [*quick, *PLAIN, "--batch-size={sst: 2, qqp: 16, sts: 4}", "--epoch-length=largest", "--epochs=1"]
    assert train.main(options) == 0
    records = [record for record in Run(tmp_path / "run").metrics.records() if "loss" in record]
    assert len(records) == 24  # sst shows its 48 examples once, the others theirs again
    summary = (tmp_path / "run" / "summary.json").read_text()
    assert f'"examples": {24 * (2 + 16 + 4)}' in summary


def test_options_about_a_task_that_is_not_trained_are_refused(quick):
    for option in ("--loss-weights={sts: 2}", "--swap-pairs=sts", "--augmented.sts=x"):
        with pytest.raises(UserError, match=r"names sts; the tasks of this run: sst, qqp"):
            train.main([*quick, "--tasks=sst,qqp", option])
    with pytest.raises(UserError, match="--batch-size has none for qqp"):
        train.main([*quick, "--batch-size={sst: 2, sts: 2}"])
