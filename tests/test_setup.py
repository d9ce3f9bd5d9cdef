"""Data, model and optimizer of a run are built one by one, each without the others' state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minbert.config import ScratchConfig, TrainConfig
from minbert.distributed.process_group import ProcessGroup
from minbert.errors import UserError
from minbert.methods.smart import BregmanConfig, SmartConfig
from minbert.model import HEADS
from minbert.training.setup import TrainingData, build_data, build_model, build_optimizer, build_plan, build_trainer

SCRATCH = ScratchConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)
FIXED = {"precision": "fp32", "scratch": SCRATCH, "lr": 1e-3, "smart": SmartConfig(lambda_s=0.0)}


def config_of(course_data, **options) -> TrainConfig:
    return TrainConfig(**{"data": str(course_data), **FIXED, **options})


@pytest.fixture
def data(course_data) -> TrainingData:
    return build_data(config_of(course_data))


def test_data_has_encoded_splits_of_every_task(course_data, data):
    assert [task.name for task in data.tasks] == ["sst", "qqp", "sts"]
    assert set(data.splits) == {"train", "dev", "test"}
    assert set(data.splits["train"]) == set(data.splits["dev"]) == {"sst", "qqp", "sts"}
    assert data.tokenizer.vocab_size <= SCRATCH.vocab_size
    longest = max(int(encoded.lengths.max()) for by_task in data.splits.values() for encoded in by_task.values())
    assert longest <= data.max_length == 512
    short = build_data(config_of(course_data, max_length=8))
    assert max(int(encoded.lengths.max()) for encoded in short.train.values()) <= short.max_length == 8


def test_data_takes_the_tokenizer_and_the_limit_of_a_checkpoint(course_data, data, tmp_path):
    model = build_model(config_of(course_data), data)
    model.encoder.save_pretrained(tmp_path)
    data.tokenizer.save(tmp_path)
    again = build_data(config_of(course_data), tmp_path)
    assert again.tokenizer.fingerprint == data.tokenizer.fingerprint
    assert {name: encoded.checksum for name, encoded in again.train.items()} == {
        name: encoded.checksum for name, encoded in data.train.items()
    }
    with pytest.raises(UserError, match=r"--max-length 1000 is more than the 512 positions of the encoder"):
        build_data(config_of(course_data, max_length=1000), tmp_path)


def test_pairs_are_encoded_as_their_head_needs_them(course_data, data):
    pairs = build_data(config_of(course_data, heads={"sts": "cosine"}))
    assert HEADS["cosine"].pair_encoding == "bi-encoder"
    assert (data.train["sts"].width, pairs.train["sts"].width, pairs.train["qqp"].width) == (1, 2, 1)


def test_the_seed_alone_decides_new_weights(course_data, data):
    def weights(seed: int, noise: int) -> list[torch.Tensor]:
        torch.manual_seed(noise)
        return list(build_model(config_of(course_data, seed=seed), data).parameters())

    same, other = weights(0, 2), weights(1, 1)
    assert all(torch.equal(one, two) for one, two in zip(weights(0, 1), same, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(same, other, strict=True))


def test_a_model_of_a_checkpoint_has_its_encoder_and_new_heads(course_data, data, tmp_path):
    model = build_model(config_of(course_data), data)
    model.encoder.save_pretrained(tmp_path)
    again = build_model(config_of(course_data, seed=1), data, tmp_path)
    for one, two in zip(model.encoder.parameters(), again.encoder.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(model.heads["sst"].weight, again.heads["sst"].weight)


def test_pretraining_freezes_the_encoder_and_needs_a_head_to_train(course_data, data):
    model = build_model(config_of(course_data, mode="pretrain"), data)
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    config = config_of(course_data, mode="pretrain", heads={"sts": "cosine"})
    with pytest.raises(UserError, match="--mode pretrain leaves nothing to train for sts"):
        build_model(config, build_data(config))


def test_an_optimizer_has_all_parameters_once_and_the_heads_rate(course_data, data):
    config = config_of(course_data, head_lr=1e-2, bregman=BregmanConfig(mu=1.0, beta=0.5))
    model = build_model(config, data)
    optimizer, parameters = build_optimizer(config, model, 3, ProcessGroup())
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "encoder.decay": 1e-3,
        "encoder.no_decay": 1e-3,
        "heads.decay": 1e-2,
        "heads.no_decay": 1e-2,
    }
    assert len(parameters.gradients.rows) == 3
    assert set(parameters.ema) == set(model.parameters())
    assert not parameters.copies


def test_the_word_table_has_sparse_gradients_on_the_cpu(course_data, data):
    config = config_of(course_data)
    model = build_model(config, data)
    assert not model.encoder.embeddings.sparse_gradient
    build_optimizer(config, model, 3, ProcessGroup())
    assert model.encoder.embeddings.sparse_gradient


def test_matrices_have_copies_in_half_precision_where_one_backward_gives_the_gradient(course_data, data):
    for options, expected in (({}, 4), ({"accumulate": 2}, 0), ({"low_memory": True}, 4)):
        config = config_of(course_data, precision="bf16", **options)
        optimizer, parameters = build_optimizer(config, build_model(config, data), 3, ProcessGroup())
        assert len(parameters.copies) == len(optimizer.copies) == expected


def test_training_examples_with_ids_outside_the_encoders_tables_are_refused(course_data, data):
    config = config_of(course_data)
    model, examples = build_model(config, data), data.train["sst"]
    ids = examples.token_ids.copy()
    ids[5] = model.encoder.config.vocab_size
    data.train["sst"] = replace(examples, token_ids=ids)
    with pytest.raises(ValueError, match=f"token id {ids[5]} is outside the encoder's table of {ids[5]}"):
        build_trainer(config, data, build_plan(config, data), model, [], ProcessGroup())


def test_a_plan_has_the_steps_of_the_smallest_task(course_data, data):
    plan = build_plan(config_of(course_data, batch_size=8, epochs=2), data)
    smallest = min(len(encoded) for encoded in data.train.values())
    assert (plan.epoch_steps, plan.steps) == (smallest // 8, 2 * (smallest // 8))
