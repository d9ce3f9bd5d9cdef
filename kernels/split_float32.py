"""A float32 tensor as a bfloat16 tensor, which products read, and the 16 low bits that the rounding left out.

Kalamkar et al. 2020 ("Optimizing deep learning recommender systems' training on CPU cluster architectures", section
III.C, "Split-SGD-BF16") keep a weight's upper and lower 16 bits apart, so that no float32 master weight is kept beside
the bfloat16 one. There the upper half is the weight cut off; here it is the weight rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_float32(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split a float32 tensor, so that `join_float32` gives every number but NaN to the bit; NaN stays NaN.

    Args:
        x: float32, of any shape.

    Returns:
        bfloat16, x rounded to nearest with ties away from zero (`x.bfloat16()` rounds ties to even); and int16, the low
        bits. Bits of x = (bits of the first << 16) + the second. Rounding ties to even would have 65,537 numbers to one
        bfloat16, one more than 16 bits tell apart.

    Raises:
        TypeError: another dtype.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"split_float32: x must be float32, got {str(x.dtype).removeprefix('torch.')}")
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_float32(high: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 tensor that `split_float32` split.

    Args:
        high: bfloat16, of any shape.
        low_bits: int16, of the same shape.

    Returns:
        float32, of that shape.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    if high.dtype != torch.bfloat16 or low_bits.dtype != torch.int16:
        raise TypeError(f"join_float32: expected bfloat16 and int16, got {high.dtype} and {low_bits.dtype}")
    if high.shape != low_bits.shape:
        raise ValueError(f"join_float32: both must have one shape, got {list(high.shape)} and {list(low_bits.shape)}")
    return ((high.view(torch.int16).to(torch.int32) << 16) + low_bits).view(torch.float32)
