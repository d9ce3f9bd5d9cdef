"""A model directory with any sizes: one line before memory is allocated, or before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from minbert import evaluate, predict, train
from minbert.data.tokenizer import Tokenizer
from minbert.errors import UserError
from minbert.files.atomic import MANIFEST, sha256
from minbert.model import Encoder, EncoderConfig
from minbert.model.weights import open_safetensors

FIXTURE = Path(__file__).parent / "fixtures" / "run-0.1.0"


@pytest.fixture
def model(tmp_path) -> Path:
    """A pretrained model as small as can be."""
    path = tmp_path / "model"
    shutil.copytree(FIXTURE / "run" / "best", path)
    return path


def set_config(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_position_embeddings", 2**63, r"max_position_embeddings: expected int of at most .*9223372036854775808"),
        ("max_position_embeddings", 10**30, r"max_position_embeddings: expected int"),
        ("max_position_embeddings", 2**20, r"position_embeddings.weight has shape \[24, 8\], expected \[1048576, 8\]"),
        ("vocab_size", 2**24, r"word_embeddings.weight has shape \[64, 8\], expected \[16777216, 8\]"),
        ("hidden_size", 2**16, r"has shape \[\d+, 8\], expected \[\d+, 65536\]"),
        ("intermediate_size", 2**18, r"intermediate.dense.weight has shape \[8, 8\], expected \[262144, 8\]"),
        ("type_vocab_size", 256, r"token_type_embeddings.weight has shape \[2, 8\], expected \[256, 8\]"),
        ("num_hidden_layers", 1024, r"config.json says 1024 layers, and the weights have 1"),
        ("num_attention_heads", 2**40, r"num_attention_heads must be"),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_allocated(model, name, value, message, monkeypatch):
    set_config(model, **{name: value})
    monkeypatch.setattr(Encoder, "__init__", lambda *arguments, **options: pytest.fail("an encoder is built"))
    with pytest.raises(UserError, match=message) as caught:
        Encoder.from_pretrained(model)
    assert "\n" not in str(caught.value)
    assert str(model) in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    encoder = Encoder(EncoderConfig(16, 8, 1, 1, 8, 8))
    with torch.no_grad():
        encoder.layers[0].output.bias[0] = value
    encoder.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"output\.dense\.bias holds NaN or an infinity"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "", ".."])
def test_an_index_names_files_beside_it_only(model, shard):
    with open_safetensors(model / "model.safetensors") as tensors:
        names = list(tensors.keys())
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(UserError, match=r"index\.json: expected names of safetensors files in"):
        Encoder.from_pretrained(model)


@pytest.fixture
def one_type(model) -> Path:
    """A model with one token type."""
    torch.manual_seed(0)
    Encoder(EncoderConfig(64, 8, 1, 1, 8, 24, type_vocab_size=1)).save_pretrained(model)
    return model


def options(model: Path, tmp_path: Path, *words: str) -> list[str]:
    common = [f"--data={FIXTURE / 'data'}", f"--model={model}", f"--out={tmp_path / 'run'}", "--batch-size=4"]
    return [*common, "--steps=1", "--precision=fp32", *words]


@pytest.mark.parametrize("head", ["linear", "layers", "layers-cosine"])
def test_one_token_type_and_a_pair_read_as_one_sequence_are_refused_before_training(one_type, tmp_path, head):
    with pytest.raises(UserError, match=rf"has 1 token type, and head {head} of sts .*--heads.sts one of concatenated"):
        train.main(options(one_type, tmp_path, "--tasks=sst,sts", f"--heads.sts={head}"))
    assert not (tmp_path / "run").exists()


def test_one_token_type_is_enough_for_sentences_by_themselves(one_type, tmp_path):
    assert train.main(options(one_type, tmp_path, "--tasks=sst,sts", "--heads.sts=cosine", "--surgery=sum")) == 0
    run = tmp_path / "run"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  sts: cosine", "  sts: linear"))
    for command, words in (
        (evaluate, []),
        (predict, ["--task=sst", f"--input={FIXTURE / 'data' / 'ids-sst-dev.csv'}"]),
    ):
        with pytest.raises(UserError, match="has 1 token type, and head linear of sts"):
            command.main([str(run), *words])


def test_a_run_that_asks_for_more_than_its_encoder_has_is_refused(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FIXTURE / "run", run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("max_length: 24", "max_length: 1000000000"))
    with pytest.raises(UserError, match="--max-length 1000000000 is more than the 24 positions"):
        evaluate.main([str(run), f"--data={FIXTURE / 'data'}"])
    (run / "config.yaml").write_text(text)
    tokenizer = Tokenizer.train(["abcdefghijklmnopqrstuvwxyz"[i:] + "xyz"[i % 3] for i in range(26)] * 3, 400)
    tokenizer.save(run / "best")
    manifest = {file.name: sha256(file) for file in (run / "best").iterdir() if file.name != MANIFEST}
    (run / "best" / MANIFEST).write_text(json.dumps(manifest))
    assert tokenizer.vocab_size > 64
    with pytest.raises(UserError, match=r"its tokenizer has .* tokens but its encoder only 64"):
        evaluate.main([str(run), f"--data={FIXTURE / 'data'}"])
