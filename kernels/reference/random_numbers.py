"""Random numbers: Philox, dropout masks and standard normals, each a function of its address."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 7  # enough to pass BigCrush (Salmon et al. 2011, table 2)
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 (Salmon et al. 2011): four random 32-bit words per counter.

    Args:
        counter: four broadcastable int64 tensors of 32-bit words.
        seed: int64 scalar; its low word is the first key word, its high word the second.

    Returns:
        four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]  # wraps at 2**64, as it should
        c0, c1, c2, c3 = (
            (product1 >> 32) & WORD ^ c1 ^ key0,
            product1 & WORD,
            (product0 >> 32) & WORD ^ c3 ^ key1,
            product0 & WORD,
        )
        key0, key1 = (key0 + PHILOX_KEY_STEPS[0]) & WORD, (key1 + PHILOX_KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def numbered(rows: Tensor, seed: Tensor) -> Tensor:
    """The numbers of an op's rows in the stream, modulo 2**32; seed holds the seed and the first row's number."""
    return (rows + seed[1]) & WORD


def drop_threshold(p: float) -> int:
    """A word below this number drops its element: floor(p * 2**32)."""
    return int(p * 2**32)


def dropout_mask(rows: int | Tensor, columns: int, p: float, seed: Tensor, stream_id: int) -> Tensor:
    """Which elements of a [rows, columns] activation dropout keeps, as bool; or of those rows of one, int32 [n].

    Element (row, column) reads word `column % 4` of counter (column // 4, row, 0, stream_id), rows `numbered`.
    """
    group = torch.arange(-(-columns // 4), device=seed.device)[None, :]
    of_rows = torch.arange(rows, device=seed.device) if isinstance(rows, int) else rows.long()
    row = numbered(of_rows[:, None], seed)
    words = philox((group, row, torch.zeros_like(row), torch.full_like(row, stream_id)), seed[0])
    return (torch.stack(words, dim=-1).reshape(len(of_rows), -1)[:, :columns] >= drop_threshold(p)).contiguous()


def attention_dropout_mask(cu_seqlens: Tensor, heads: int, p: float, seed: Tensor, stream_id: int) -> Tensor:
    """Which attention probabilities dropout keeps: bool, one [heads, length, length] block per sequence, end to end.

    Probability (head, query, key) reads word `head % 4` of counter (key's position in its sequence,
    query's row in the packed stream, head // 4, stream_id), rows `numbered`.
    """
    blocks = []
    bounds = cu_seqlens.tolist()
    group = torch.arange(-(-heads // 4), device=seed.device)[:, None, None]
    for start, end in pairwise(bounds):
        query = numbered(torch.arange(start, end, device=seed.device)[None, :, None], seed)
        key = torch.arange(end - start, device=seed.device)[None, None, :]
        words = philox((key, query, group, torch.full_like(group, stream_id)), seed[0])
        blocks.append((torch.stack(words, dim=1).flatten(0, 1)[:heads] >= drop_threshold(p)).flatten())
    return torch.cat(blocks)


def normal(rows: int, columns: int, seed: Tensor, stream_id: int, dtype: torch.dtype) -> Tensor:
    """Standard normals [rows, columns] by Box and Muller (1958), float32 or float64.

    Element (row, column) comes from counter (column // 4, row, 1, stream_id), rows `numbered`. Of its words (w0, w1,
    w2, w3), the pair (w0, w1) gives columns 4 k and 4 k + 1, the pair (w2, w3) columns 4 k + 2 and 4 k + 3: with the
    upper 24 bits of a pair (a, b), u = (a + 1) / 2^24 in (0, 1] and v = b / 2^24 in [0, 1), all exact in float32, they
    are sqrt(-2 ln u) cos(2 pi v) and sqrt(-2 ln u) sin(2 pi v).
    """
    group = torch.arange(-(-columns // 4), device=seed.device)[None, :]
    row = numbered(torch.arange(rows, device=seed.device)[:, None], seed)
    words = (
        torch.stack(philox((group, row, torch.ones_like(row), torch.full_like(row, stream_id)), seed[0]), dim=-1) >> 8
    )
    u = (words[..., 0::2] + 1).to(dtype) / 2**24
    v = words[..., 1::2].to(dtype) / 2**24
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).reshape(rows, -1)[:, :columns]
