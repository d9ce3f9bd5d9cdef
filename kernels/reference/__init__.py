"""Every op in plain PyTorch. This package is the specification: a kernel is right when it agrees with it.

Half-precision inputs are widened to float32 inside an op and rounded once on the way out; float64 stays float64.
Shapes: N tokens, D hidden size, H heads, d = D / H, S sequences, T tasks.
"""

from __future__ import annotations

from .adamw import adamw_, combine_adamw_
from .layers import (
    attention,
    bias_gelu,
    dropout,
    dropout_add_layer_norm,
    embedding,
    encoder_layers,
    first_token_attention,
)
from .random_numbers import attention_dropout_mask, drop_threshold, dropout_mask, normal, numbered, philox
from .smart import smart_ascend, smart_init
from .surgery import clip_weights, combine, gram, surgery_weights
from .weightings import task_weights

__all__ = [
    "adamw_",
    "attention",
    "attention_dropout_mask",
    "bias_gelu",
    "clip_weights",
    "combine",
    "combine_adamw_",
    "drop_threshold",
    "dropout",
    "dropout_add_layer_norm",
    "dropout_mask",
    "embedding",
    "encoder_layers",
    "first_token_attention",
    "gram",
    "normal",
    "numbered",
    "philox",
    "smart_ascend",
    "smart_init",
    "surgery_weights",
    "task_weights",
]
