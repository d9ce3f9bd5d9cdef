"""The encoder, its weights and the task heads."""

from minbert.model.config import EncoderConfig
from minbert.model.encoder import Encoder
from minbert.model.heads import HEADS, Head, pair_encoding
from minbert.model.layers import SHARED_LAYERS, statistics_kept
from minbert.model.multitask import MultitaskModel, load_heads, save_heads
from minbert.model.pooling import POOLINGS, pool

__all__ = [
    "HEADS",
    "POOLINGS",
    "SHARED_LAYERS",
    "Encoder",
    "EncoderConfig",
    "Head",
    "MultitaskModel",
    "load_heads",
    "pair_encoding",
    "pool",
    "save_heads",
    "statistics_kept",
]
