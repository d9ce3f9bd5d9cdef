"""Weights that `linear` reads many times: cast once, and packed once as oneDNN reads them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import checks
from .dispatch import choice
from .matmul_library import by_onednn, multiplied_by_onednn

_Kept = dict[tuple[Any, ...], tuple[Tensor, "Tensor | PackedWeight"]]
_thread = threading.local()  # another thread's weights may change meanwhile


class PackedWeight:
    """A weight [outputs, inputs] in the layout that oneDNN multiplies by; `linear` takes it in place of a tensor.

    A product with a plain weight brings it into that layout at each call. With the tokens of a single sentence that is
    a third of the product's time.
    """

    def __init__(self, weight: Tensor) -> None:
        self._plain = weight
        self._parts: dict[tuple[int, ...], tuple[PackedWeight, ...]] = {}

    @property
    def shape(self) -> torch.Size:
        return self._plain.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._plain.dtype

    @cached_property
    def packed(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self._plain.contiguous())

    def split(self, sizes: Sequence[int]) -> tuple[PackedWeight, ...]:
        """Weights of so many outputs each, packed once too."""
        key = tuple(sizes)
        if key not in self._parts:
            self._parts[key] = tuple(PackedWeight(part) for part in self._plain.split(list(key)))
        return self._parts[key]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias.

        Args:
            x: [N, inputs], of the weight's dtype.
            bias: [outputs], float.

        Raises:
            ValueError, TypeError: an argument is not as described.
        """
        plain = self._plain
        checks.tensor("linear", "x", x, ["N", plain.shape[1]], [plain.dtype], like=plain, contiguous=False)
        if bias is not None:
            checks.tensor("linear", "bias", bias, [plain.shape[0]], checks.FLOATS, like=plain)
            bias = bias.to(plain.dtype)
        return by_onednn(x, self.packed, bias)


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor | PackedWeight:
    """A weight for products of `dtype` without gradients: packed where `linear` multiplies by oneDNN, else cast alone.

    Args:
        weight: [outputs, inputs]; a later change of its values may or may not be seen.
        dtype: of the products' inputs.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    checks.tensor("pack_weight", "weight", weight, ["outputs", "inputs"], checks.FLOATS, contiguous=False)
    checks.float_dtype("pack_weight", dtype)
    cast = weight.detach().to(dtype)
    return PackedWeight(cast) if choice() == "auto" and multiplied_by_onednn(cast) else cast


@contextmanager
def weights_packed_once() -> Iterator[None]:
    """Let `linear` cast and pack each weight once, at its first use, for all forwards and backwards in this block.

    It holds for this thread. No weight that the thread reads may change in the block. It pays where a weight is read
    several times, as with SMART three times in each direction, and takes the memory of two copies of the weights.
    """
    before, _thread.kept = getattr(_thread, "kept", None), _Kept()
    try:
        yield
    finally:
        _thread.kept = before


def as_multiplied(weight: Tensor, dtype: torch.dtype, *, transposed: bool = False) -> Tensor | PackedWeight:
    """The weight, or its transpose, cast to `dtype`; within `weights_packed_once` as `pack_weight` gives it."""
    kept: _Kept | None = getattr(_thread, "kept", None)
    if kept is None:
        cast = weight.to(dtype)
        return cast.t() if transposed else cast
    key = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, dtype, transposed
    if key not in kept:
        packed = pack_weight(weight.t() if transposed else weight, dtype)
        kept[key] = weight, packed  # the weight itself too, so that no other gets its address
    return kept[key][1]
