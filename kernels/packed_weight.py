"""Weights of `linear` for many forwards without gradients: cast once, and packed once as oneDNN reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from . import checks, native
from .dispatch import choice
from .matmul_library import matmul


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
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor | PackedWeight:
    """A weight for products of `dtype` without gradients: packed where `linear` multiplies by oneDNN, else cast alone.

    Args:
        weight: [outputs, inputs]; a later change of its values may or may not be seen.
        dtype: of the products' inputs.
    """
    cast = weight.detach().to(dtype)
    return PackedWeight(cast) if _multiplied_by_onednn(cast) else cast


def _multiplied_by_onednn(weight: Tensor) -> bool:
    """float32 where it is chosen, bf16 where the processor multiplies it."""
    if weight.device.type != "cpu" or choice() == "reference" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        features = native.cpu_features()
        return features["avx512_bf16"] or features["amx_bf16"]
    return weight.dtype == torch.float32 and matmul() == "onednn"
