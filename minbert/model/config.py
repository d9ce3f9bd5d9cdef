"""The encoder's shape, in the words of Hugging Face's config.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from minbert.errors import UserError
from minbert.files.atomic import write_text
from minbert.files.json_yaml import read_json, short
from minbert.files.schema_checks import checked, types_of_fields

LARGEST = {  # far beyond every BERT, and small enough that no size overflows another
    "vocab_size": 2**24,
    "hidden_size": 2**16,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**12,
    "intermediate_size": 2**18,
    "max_position_embeddings": 2**20,
    "type_vocab_size": 256,
}
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_DECODER = ("is_decoder", "add_cross_attention")


@dataclass(frozen=True)
class EncoderConfig:
    """A BERT encoder; the defaults are BERT-base's (Devlin et al. 2019, section 3).

    Raises:
        UserError: values that describe no encoder, or one that minbert does not have.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"

    def __post_init__(self) -> None:
        for name, kind in types_of_fields(EncoderConfig).items():
            checked(getattr(self, name), kind, name)
        for name, limit in LARGEST.items():
            value = getattr(self, name)
            _require(0 < value <= limit, name, f"a positive whole number up to {limit}", value)
        for name in _PROBABILITIES:
            value = getattr(self, name)
            _require(0 <= value < 1, name, "at least 0 and below 1", value)
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            _require(0 < value <= 10, name, "a positive number up to 10", value)
        pad = self.pad_token_id
        _require(0 <= pad < self.vocab_size, "pad_token_id", "a token of the vocabulary", pad)
        _require(self.hidden_act == "gelu", "hidden_act", "'gelu' (the only one minbert has)", self.hidden_act)
        kind = self.position_embedding_type
        _require(kind == "absolute", "position_embedding_type", "'absolute' (the only one minbert has)", kind)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )

    def with_dropout(self, p: float | None) -> EncoderConfig:
        """The same encoder with dropout `p` everywhere; None leaves it as it is."""
        return self if p is None else replace(self, hidden_dropout_prob=p, attention_probs_dropout_prob=p)

    @classmethod
    def from_json(cls, path: str | Path) -> EncoderConfig:
        """Read a BERT model's config.json; what the encoder has no use for is left aside.

        Raises:
            UserError: no such file, not JSON, another kind of model, or impossible values.
        """
        if not Path(path).exists():
            raise UserError(f"no file {path}; give the directory of a BERT checkpoint")
        saved = read_json(Path(path))
        if "hidden_size" not in saved:
            raise UserError(
                f"{path} describes no encoder (it has no hidden_size); give a BERT checkpoint's config.json"
            )
        kind = saved.get("model_type", "bert")
        if kind != "bert":
            raise UserError(f"{path} describes a model of type {short(kind)}; minbert reads BERT's, 'bert'")
        for name in _DECODER:
            if saved.get(name):
                raise UserError(f"{path}: {name} is set, but minbert has encoders only; give an encoder checkpoint")
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in saved.items() if name in known and value is not None})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_json(self, path: str | Path) -> None:
        """Write a config.json that transformers reads as a BertModel's."""
        saved: dict[str, Any] = {"architectures": ["BertModel"], "model_type": "bert", **asdict(self)}
        write_text(Path(path), json.dumps(saved, indent=2) + "\n")


def _require(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise UserError(f"{name} must be {expected}, got {short(got)}")
