"""--split-master-weights: training equals that with float32 weights and copies, and so do its checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from compare_runs import assert_equal, assert_equal_runs, interrupted, state, weights
from small_trainer import SIZES, trainer
from torch import Tensor

from minbert import inference, train
from minbert.config import TrainConfig
from minbert.errors import UserError
from minbert.runs.run_directory import Run
from minbert.training.loop import training_step
from minbert.training.optimizer import AdamW
from minbert.training.setup import build_data, build_model, build_optimizer
from minbert.training.trainer import Trainer
from minbert.training.training_run import TrainingRun

MATRICES = 4 * SIZES["num_hidden_layers"]


@torch.no_grad()
def two_trainers(**options: object) -> tuple[Trainer, Trainer]:
    """Of float32 weights with copies, and of split weights; all matrices begin with numbers that are bfloat16."""
    whole, split = (trainer(dtype=torch.bfloat16, **kind, **options) for kind in ({"copied": True}, {"split": True}))
    pairs = zip(whole.optimizer.copies.items(), split.optimizer.low_bits.items(), strict=True)
    for (param, copy), (high, low_bits) in pairs:
        param.copy_(copy)
        high.copy_(copy)
        low_bits.zero_()
    for optimizer in (whole.optimizer, split.optimizer):
        move_ties(optimizer)
        for param, average in optimizer.ema.items():
            average.copy_(optimizer.master(param))
    return whole, split


def move_ties(optimizer: AdamW) -> None:
    """Move ties by one bit: a copy rounds a number halfway between two of bfloat16 to even, a split away from 0."""
    update = optimizer.combined_step

    @torch.no_grad()
    def combined_step(*arguments, **options):
        counted = update(*arguments, **options)
        for param, copy in optimizer.copies.items():
            bits = param.view(torch.int32)
            bits += (bits & 0xFFFF) == 0x8000
            copy.copy_(param)
        for low_bits in optimizer.low_bits.values():
            low_bits += low_bits == -0x8000
        return counted

    optimizer.combined_step = combined_step


@pytest.mark.parametrize(
    "options", [{}, {"surgery": "gse", "mu": 0.5}, {"surgery": "sum", "weight": 0.0}, {"low_memory": True}]
)
def test_steps_have_the_bits_of_float32_weights_with_copies(options):
    whole, split = two_trainers(**options)
    assert len(split.optimizer.low_bits) == len(whole.optimizer.copies) == MATRICES
    assert not whole.optimizer.low_bits
    assert not split.optimizer.copies
    pairs = list(zip(whole.model.parameters(), split.model.parameters(), strict=True))
    for step in range(4):
        wanted, got = (training_step(each, step, 0.5).result() for each in (whole, split))
        assert got.loss == wanted.loss
        for param, other in pairs:
            assert torch.equal(split.optimizer.master(other), param)
            moments, others = whole.optimizer.state[param], split.optimizer.state[other]
            assert moments.keys() == others.keys()
            assert all(others[name].dtype == torch.float32 for name in others)
            assert all(torch.equal(others[name], moments[name]) for name in others)
            assert torch.equal(other, whole.optimizer.copies.get(param, param))


def test_a_parameter_takes_four_bytes_and_its_moments_eight():
    _, split = two_trainers()
    training_step(split, 0, 0.5).result()
    for param, low_bits in split.optimizer.low_bits.items():
        assert (param.dtype, low_bits.dtype) == (torch.bfloat16, torch.int16)
        kept = [param, low_bits, *(value for value in split.optimizer.state[param].values() if value.ndim)]
        assert sum(tensor.nbytes for tensor in kept) == 12 * param.numel()
        assert not [tensor for tensor in kept if tensor.untyped_storage().nbytes() != tensor.nbytes]


SPLIT = ["--precision=bf16", "--split-master-weights", "--dropout=0.1"]


@pytest.mark.parametrize("options", [[], ["--bregman.mu=0.5", "--surgery=gse"]])
def test_a_run_goes_on_to_the_bit(quick, tmp_path, options):
    straight = tmp_path / "straight"
    assert train.main([*quick, *SPLIT, *options, f"--out={straight}"]) == 0
    with interrupted("minbert.training.loop.training_step", 6):
        train.main([*quick, *SPLIT, *options])
    assert train.main([*quick, *SPLIT, *options, "--resume"]) == 0
    assert_equal_runs(straight, tmp_path / "run")
    assert Run(straight).summary()["dev"] == Run(tmp_path / "run").summary()["dev"]


def test_checkpoints_are_those_of_a_run_without_it(quick, tmp_path, capsys):
    """Of the same tensors in float32: each kind of run goes on from the other's, and says that it rounds otherwise."""
    whole, split = tmp_path / "whole", tmp_path / "run"
    assert train.main([*quick, "--precision=bf16", "--dropout=0.1", "--steps=3", f"--out={whole}"]) == 0
    assert train.main([*quick, *SPLIT, "--steps=3"]) == 0
    one, other = state(whole), state(split)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in one.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in other.items()
    }
    capsys.readouterr()
    resumed = [*quick, "--precision=bf16", "--dropout=0.1", "--steps=6", "--resume"]
    assert train.main(resumed) == 0
    assert "--split-master-weights (was True, is False): sums may round differently" in capsys.readouterr().out
    assert train.main([*resumed, "--split-master-weights", f"--out={whole}"]) == 0
    assert "--split-master-weights (was False, is True): sums may round differently" in capsys.readouterr().out
    assert [Run(path).summary()["steps"] for path in (whole, split)] == [6, 6]


def test_a_run_scores_the_weights_that_are_loaded_from_its_checkpoint(quick, tmp_path):
    """Each weight is halfway between two bfloat16 numbers: a split rounds it away from 0, and what loads it to even."""
    scored: list[dict[str, Tensor]] = []
    finish_epoch = TrainingRun.finish_epoch

    def of_ties(run, *arguments):
        for low_bits in run.trainer.optimizer.low_bits.values():
            low_bits.fill_(-0x8000)
        finish_epoch(run, *arguments)

    def evaluate(model, *arguments, **options):
        tensors = model.encoder.huggingface_tensors(pooler=False)
        scored.append({f"model.{name}": tensor.detach().bfloat16() for name, tensor in tensors.items()})
        return inference.evaluate(model, *arguments, **options)

    with (
        patch("minbert.training.training_run.evaluate", evaluate),
        patch.object(TrainingRun, "finish_epoch", of_ties),
    ):
        assert train.main([*quick, *SPLIT, "--epochs=1"]) == 0
    saved = weights(tmp_path / "run", "best")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    matrix = saved["model.encoder.layer.0.intermediate.dense.weight"]
    assert ((matrix.view(torch.int32) & 0xFFFF) == 0x8000).all()
    at_the_end_of_the_epoch, *loaded = scored
    assert len(loaded) >= 1
    for tensors in (at_the_end_of_the_epoch, *loaded):
        assert_equal(tensors, {name: saved[name].bfloat16() for name in tensors})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "fp32"}, "--precision fp32 leaves none"),
        ({"accumulate": 2}, "--accumulate 2 leaves none"),
        ({"mode": "pretrain"}, "--mode pretrain leaves none"),
    ],
)
def test_options_that_leave_nothing_to_split_are_refused(options, reason):
    with pytest.raises(UserError, match=f"--split-master-weights splits the matrices .* bf16 .*, and {reason}"):
        TrainConfig(split_master_weights=True, **options)


def test_a_run_that_has_nothing_to_split_is_refused(course_data):
    config = TrainConfig(data=str(course_data), precision="bf16", lr=1e-3, split_master_weights=True)
    data = build_data(config)
    for changes, rows in (({"low_memory": True}, 1), ({"freeze_layers": config.scratch.num_hidden_layers}, 3)):
        changed = config.replace(**changes)
        with pytest.raises(UserError, match="this run in bf16 has none; leave it out"):
            build_optimizer(changed, build_model(changed, data), rows, inference.ProcessGroup())
    several = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    with pytest.raises(UserError, match="--split-master-weights is for one process, and this run has 2; leave it out"):
        build_optimizer(config, build_model(config, data), 3, several)


def test_it_goes_with_half_of_low_memory(course_data):
    """With a gradient of each task, a parameter's gradients come from one backward each."""
    config = TrainConfig(data=str(course_data), precision="bf16", lr=1e-3, split_master_weights=True, low_memory=True)
    model = build_model(config, build_data(config))
    optimizer, parameters = build_optimizer(config, model, 3, inference.ProcessGroup())
    assert len(optimizer.low_bits) == 4 * config.scratch.num_hidden_layers
    assert not parameters.copies
