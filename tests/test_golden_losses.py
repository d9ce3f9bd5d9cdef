"""Twenty steps of the demo have the losses that they had before, whatever the processor.

    python tests/test_golden_losses.py

writes tests/golden_losses.json anew, after a change that is meant to change them: to the demo corpus, the tokenizer, a
default below that is not named, an algorithm. The file holds one series of losses for each task and precision. It is
the same for all instruction sets and libraries, which differ in the order of their sums only.

The tolerances, in shares of a loss, come from runs on one processor with AVX-512 and bf16 multiplication, as every set
of kernels and the reference backend, with torch, MKL and oneDNN held to AVX2 and to SSE:

fp32: 2^-18 = 3.8e-6. The runs differed by at most 2.9e-7, five units in the last place of a float32 below 1: each loss
is a mean of float32 terms, and AdamW's steps hand on what the gradients' sums have rounded.

bf16: 2^-8 = 3.9e-3, a unit in the last place of a bfloat16. A sum in another order rounds an activation the other way,
which moves an output, and with it a loss, by less than that; a loss of several examples moves by a share of it. The
runs differed by at most 1.0e-3.

So fp32 notices three percent of a loss weight (5.6e-4), and both notice five percent of the learning rate (1e-2).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from rich.console import Console

from minbert.config import ScratchConfig, TrainConfig
from minbert.kernels import native
from minbert.methods.smart import SmartConfig
from minbert.runs.run_directory import Run
from minbert.train import train

GOLDEN = Path(__file__).with_name("golden_losses.json")
TOLERANCE = {"fp32": 2**-18, "bf16": 2**-8}
STEPS = 20

Losses = dict[str, list[float]]  # by task


def losses(precision: str, **options: object) -> Losses:
    """Each task's loss in each step of the demo; nothing is evaluated."""
    fixed = {
        "batch_size": 8,
        "device": "cpu",
        "log_steps": 1,
        "lr": 1e-3,
        "smart": SmartConfig(lambda_s=1.0),
        "matmul": "blas",
        "scratch": ScratchConfig(vocab_size=2000, hidden_size=64, num_hidden_layers=2, intermediate_size=256),
        "steps": STEPS,
        "threads": 2,
    }
    with (
        tempfile.TemporaryDirectory() as directory,
        patch("minbert.training.training_run.TrainingRun.finish_epoch"),
        patch("minbert.training.training_run.TrainingRun.finish"),
    ):
        out = f"{directory}/run"
        train(TrainConfig(**{**fixed, **options, "out": out, "precision": precision}), Console(quiet=True))
        steps = [record["loss"] for record in Run(out).metrics.records()]
    assert len(steps) == STEPS
    return {task: [step[task] for step in steps] for task in steps[0]}


def furthest(found: Losses, golden: Losses) -> float:
    """The largest difference between two series, as a share of the loss."""
    assert found.keys() == golden.keys()
    return max(abs(one / other - 1) for task in golden for one, other in zip(found[task], golden[task], strict=True))


@pytest.fixture(scope="module")
def golden() -> dict[str, Losses]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def own_isa() -> Iterator[None]:
    """Restore the instruction set after each test."""
    before = native.isa()
    yield
    if before is not None:
        native.library().set_isa(before)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_losses_are_the_golden_ones(precision: str, isa: str, golden: dict[str, Losses]) -> None:
    if not native.available() or isa not in native.library().isas():
        pytest.skip(f"no {isa} here")
    native.library().set_isa(isa)
    assert furthest(losses(precision), golden[precision]) <= TOLERANCE[precision]


def test_losses_of_the_reference_backend_are_the_golden_ones(golden: dict[str, Losses]) -> None:
    assert furthest(losses("fp32", backend="reference"), golden["fp32"]) <= TOLERANCE["fp32"]


@pytest.mark.parametrize(
    ("precision", "changed"),
    [("fp32", {"loss_weights": {"sts": 1.03}}), ("fp32", {"lr": 1.05e-3}), ("bf16", {"lr": 1.05e-3})],
    ids=["fp32-weight", "fp32-lr", "bf16-lr"],
)
def test_a_change_of_a_few_percent_is_noticed(precision: str, changed: dict, golden: dict[str, Losses]) -> None:
    assert furthest(losses(precision, **changed), golden[precision]) > TOLERANCE[precision]


if __name__ == "__main__":
    series = {precision: losses(precision) for precision in TOLERANCE}
    GOLDEN.write_text(json.dumps(series, indent=1) + "\n", encoding="utf-8")
    print(f"written: {GOLDEN}")
