"""config.json in and out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from minbert.errors import UserError
from minbert.model import EncoderConfig


def test_config_survives_transformers(tmp_path: Path, tiny_config: EncoderConfig) -> None:
    tiny_config.to_json(tmp_path / "config.json")
    transformers.BertConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert EncoderConfig.from_json(tmp_path / "config.json") == tiny_config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30 must be a multiple of num_attention_heads 4"),
        ({"hidden_act": "relu"}, r"hidden_act must be 'gelu' \(the only one minbert has\), got 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"vocab_size": 0}, "vocab_size must be a positive whole number up to 16777216, got 0"),
        ({"max_position_embeddings": 2**20 + 1}, "max_position_embeddings must be .* up to 1048576, got 1048577"),
        ({"max_position_embeddings": 2**63}, "max_position_embeddings: expected int .*, got 9223372036854775808"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be .* up to 1024, got 1000000000"),
        ({"hidden_size": True}, "hidden_size: expected int, got true"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps: expected float.*, got nan"),
        ({"hidden_act": ["gelu"]}, "hidden_act: expected str, got a list"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers: expected int, got 1.5"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be at least 0 and below 1, got 1.0"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps: expected float, got 'small'"),
        ({"pad_token_id": 30522}, "pad_token_id must be a token of the vocabulary, got 30522"),
    ],
)
def test_impossible_encoders_are_refused_at_construction(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EncoderConfig(**values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read .*config.json"),
        ("[]", "expected a JSON object, got a list"),
        ("{}", "describes no encoder"),
        (json.dumps({"model_type": "roberta", "hidden_size": 8}), "describes a model of type 'roberta'"),
        (json.dumps({"hidden_size": 8, "is_decoder": True}), "is_decoder is set, but minbert has encoders only"),
        (json.dumps({"hidden_size": 8}), "config.json: hidden_size 8 must be a multiple of num_attention_heads 12"),
    ],
)
def test_unusable_config_files_are_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        EncoderConfig.from_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
