"""From one vector per token to one per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from minbert.data.packing import Packed
from minbert.errors import did_you_mean

FIRST_TOKEN_POOLINGS = ("cls", "pooler")  # those that read the first token's vector alone
POOLINGS = ("cls", "mean", "max", "pooler")


def check_pooling(how: str) -> None:
    """Refuse an unknown way to pool.

    Raises:
        ValueError: `how` is none of `POOLINGS`.
    """
    if how not in POOLINGS:
        raise ValueError(f"unknown pooling {how!r}{did_you_mean(how, POOLINGS)}; known: {', '.join(POOLINGS)}")


def pool(hidden: Tensor, packed: Packed, how: str) -> Tensor:
    """One vector per sequence, in float32 at least.

    Args:
        hidden: [N, D].
        how: `cls`, the first token's vector; `mean` or `max`, over all tokens of the sequence, special tokens
            included (max gives a tie's gradient to the tied tokens in equal parts).

    Returns:
        [S, D].

    Raises:
        ValueError: unknown `how`; `pooler` has weights of its own, so `Encoder.pool` does it.
    """
    check_pooling(how)
    if how == "cls":
        return at_least_float32(hidden.index_select(0, packed.cu_seqlens[:-1]))
    if how == "pooler":
        raise ValueError("pooling 'pooler' needs the encoder's own weights; call Encoder.pool")
    return torch.segment_reduce(at_least_float32(hidden), how, offsets=packed.cu_seqlens, axis=0, unsafe=True)


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
