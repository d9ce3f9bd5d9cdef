"""The encoder, its weights and the task heads."""

from minbert.model.config import EncoderConfig
from minbert.model.encoder import Encoder
from minbert.model.heads import HEADS, LinearHead
from minbert.model.multitask import MultitaskModel, load_heads, save_heads
from minbert.model.pooling import POOLINGS, pool

__all__ = [
    "HEADS",
    "POOLINGS",
    "Encoder",
    "EncoderConfig",
    "LinearHead",
    "MultitaskModel",
    "load_heads",
    "pool",
    "save_heads",
]
