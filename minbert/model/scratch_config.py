"""The shape of an encoder from scratch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minbert.errors import require


@dataclass(frozen=True)
class ScratchConfig:
    """The encoder built when no pretrained model is given.

    Args:
        vocab_size: WordPiece vocabulary learned from the training texts, at most this many pieces.
        hidden_size: width of the token stream.
        num_hidden_layers: transformer layers.
        num_attention_heads: attention heads; must divide hidden_size.
        intermediate_size: width of the feed-forward layers.
    """

    vocab_size: int = 8000
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value > 0, f"scratch.{name}", "positive", value)
