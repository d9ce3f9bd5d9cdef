"""Pooling, heads, and the tasks' shares of one packed stream."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from minbert.data.packing import Packed
from minbert.errors import UserError
from minbert.model import Encoder, EncoderConfig, MultitaskModel, load_heads, pool, save_heads
from minbert.tasks import find_tasks

COUNTS = {"sst": 2, "sts": 2, "qqp": 1}


@pytest.fixture
def model(tiny_config: EncoderConfig) -> MultitaskModel:
    return MultitaskModel(Encoder(tiny_config), find_tasks(["sst", "qqp", "sts"])).eval()


@pytest.mark.parametrize("how", ["cls", "mean", "max"])
def test_pooling_agrees_with_a_loop_over_sequences_gradient_included(packed: Packed, how: str) -> None:
    hidden = torch.randn(len(packed.token_ids), 6, dtype=torch.float64, requires_grad=True)
    reduce = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[how]
    expected = torch.stack([reduce(sequence) for sequence in hidden.split(packed.lengths.tolist())])
    pooled = pool(hidden, packed, how)
    torch.testing.assert_close(pooled, expected)
    direction = torch.randn_like(pooled)
    torch.testing.assert_close(
        torch.autograd.grad(pooled, hidden, direction), torch.autograd.grad(expected, hidden, direction)
    )


@pytest.mark.parametrize("how", ["cls", "mean", "max"])
def test_pooling_half_precision_gives_float32(packed: Packed, how: str) -> None:
    hidden = torch.randn(len(packed.token_ids), 6).bfloat16()
    assert torch.equal(pool(hidden, packed, how), pool(hidden.float(), packed, how))


def test_impossible_poolings_are_refused(tiny_config: EncoderConfig, packed: Packed) -> None:
    encoder, hidden = Encoder(tiny_config), torch.zeros(63, 32)
    with pytest.raises(
        ValueError, match=r"unknown pooling 'men' \(did you mean 'mean'\?\); known: cls, mean, max, pooler"
    ):
        encoder.pool(hidden, packed, "men")
    with pytest.raises(ValueError, match="needs the encoder's own weights; call Encoder"):
        pool(hidden, packed, "pooler")
    with pytest.raises(ValueError, match=r"this encoder has no pooler; .* pooler=True"):
        encoder.pool(hidden, packed, "pooler")
    with pytest.raises(ValueError, match="needs an encoder with a pooler"):
        MultitaskModel(encoder, find_tasks(["sst"]), pooling="pooler")
    with pytest.raises(ValueError, match="unknown pooling 'first'"):
        MultitaskModel(encoder, find_tasks(["sst"]), pooling="first")


def test_each_task_gets_the_outputs_of_its_own_sequences(model: MultitaskModel, packed: Packed) -> None:
    outputs = model(packed, COUNTS)
    assert {name: tuple(rows.shape) for name, rows in outputs.items()} == {"sst": (2, 5), "sts": (2,), "qqp": (1,)}
    pooled = model.encoder.pool(model.encoder(packed), packed)
    for name, rows in {"sst": pooled[:2], "sts": pooled[2:4], "qqp": pooled[4:]}.items():
        head = model.heads[name]
        expected = rows @ head.weight.T + head.bias
        torch.testing.assert_close(outputs[name], expected.squeeze(1) if head.weight.shape[0] == 1 else expected)


@pytest.mark.parametrize("training", [False, True])
def test_a_task_without_sequences_has_empty_outputs(model: MultitaskModel, packed: Packed, training: bool) -> None:
    outputs = model.train(training)(packed, {"sst": 5, "sts": 0})
    assert (outputs["sst"].shape, outputs["sts"].shape) == ((5, 5), (0,))


def test_counts_that_do_not_fit_are_refused(model: MultitaskModel, packed: Packed) -> None:
    with pytest.raises(ValueError, match=r"no head for task 'ssst' \(did you mean 'sst'\?\); heads: sst, qqp, sts"):
        model(packed, {"ssst": 5})
    with pytest.raises(ValueError, match=r"counts \{'sst': 4\} must add up to the 5 sequences"):
        model(packed, {"sst": 4})


def test_heads_compute_in_float32_over_a_bfloat16_encoder(model: MultitaskModel, packed: Packed) -> None:
    model.encoder.compute_dtype = torch.bfloat16
    assert {rows.dtype for rows in model(packed, COUNTS).values()} == {torch.float32}


def test_head_dropout_follows_the_seed_and_differs_between_tasks(tiny_config: EncoderConfig, packed: Packed) -> None:
    config = EncoderConfig(**{**vars(tiny_config), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    model = MultitaskModel(Encoder(config), find_tasks(["qqp", "sts"]), head_dropout=0.5).train()
    with torch.no_grad():
        for head in model.heads.values():
            head.weight.fill_(1.0)
    outputs = partial(model.from_embedded, torch.zeros(len(packed.token_ids), 32), packed, all_gather=torch.ones_like)
    one, again, other = (outputs({"qqp": 0, "sts": 5}, seed=torch.tensor(seed))["sts"] for seed in (1, [1, 0], 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, outputs({"qqp": 5, "sts": 0}, seed=torch.tensor(1))["qqp"])
    torch.testing.assert_close(one, (one / 2).round() * 2)  # a kept element counts 1 / (1 - 0.5)


def test_frozen_encoder_runs_in_evaluation_mode_and_only_heads_learn(model: MultitaskModel, packed: Packed) -> None:
    model.freeze_encoder()
    model.train()
    assert model.frozen
    assert not model.encoder.training
    assert model.heads.training
    sum(rows.sum() for rows in model(packed, COUNTS).values()).backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.heads.parameters())
    assert {group["name"] for group in model.parameter_groups(0.1)} == {"heads.decay", "heads.no_decay"}


def test_weight_decay_is_for_matrices_alone_and_every_parameter_is_in_one_group(model: MultitaskModel) -> None:
    groups = {group["name"]: group for group in model.parameter_groups(0.1)}
    assert list(groups) == ["encoder.decay", "encoder.no_decay", "heads.decay", "heads.no_decay"]
    group_of = {parameter: name for name, group in groups.items() for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups.values()) == len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        decays = not (name.endswith("bias") or "norm" in name)
        assert group_of[parameter] == f"{name.partition('.')[0]}.{'decay' if decays else 'no_decay'}", name
    assert [group["weight_decay"] for group in groups.values()] == [0.1, 0.0, 0.1, 0.0]
    torch.optim.AdamW(model.parameter_groups(0.1))


def test_heads_survive_a_file_and_a_model_may_want_fewer_of_them(
    model: MultitaskModel, tiny_config: EncoderConfig, tmp_path: Path
) -> None:
    save_heads(model, tmp_path / "heads.safetensors")
    other = MultitaskModel(Encoder(tiny_config), find_tasks(["sts"]))
    load_heads(other, tmp_path / "heads.safetensors")
    assert torch.equal(other.heads["sts"].weight, model.heads["sts"].weight)


def test_heads_that_do_not_fit_are_refused(model: MultitaskModel, tiny_config: EncoderConfig, tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    with pytest.raises(UserError, match=r"no file .*heads.safetensors"):
        load_heads(model, path)
    save_heads(MultitaskModel(Encoder(tiny_config), find_tasks(["sst", "cfimdb"])), path)
    with pytest.raises(UserError, match=r"has no head for task 'qqp' \(it has cfimdb, sst\); choose among"):
        load_heads(model, path)
    wide = EncoderConfig(**{**vars(tiny_config), "hidden_size": 64})
    save_heads(MultitaskModel(Encoder(wide), find_tasks(["sst", "qqp", "sts"])), path)
    with pytest.raises(UserError, match=r"heads.safetensors: sst.weight has shape \[5, 64\], expected \[5, 32\]"):
        load_heads(model, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_heads(model, path)
