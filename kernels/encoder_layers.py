"""The layers of BERT where no gradient is needed: one call of compiled code for all of them, with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import checks, native_calls, reference
from .dispatch import is_compiled
from .flight_recorder import recorded
from .native import library


class LayerParameters(NamedTuple):
    """A layer's parameters, of D hidden and I inner elements."""

    qkv_weight: Tensor  # [3 D, D], of queries, keys and values
    qkv_bias: Tensor
    attention_output_weight: Tensor  # [D, D]
    attention_output_bias: Tensor
    attention_norm_weight: Tensor  # [D]
    attention_norm_bias: Tensor
    intermediate_weight: Tensor  # [I, D]
    intermediate_bias: Tensor
    output_weight: Tensor  # [D, I]
    output_bias: Tensor
    output_norm_weight: Tensor  # [D]
    output_norm_bias: Tensor


class PackedLayers:
    """Layers for `encoder_layers`, whose weights are cast and packed once.

    They are packed for one dtype and instruction set, where compiled code takes them. A later change of the parameters
    may or may not be seen.

    Attributes:
        packed: the parameters as compiled code reads them, uint8; None where the reference runs.

    Args:
        layers: from the first to the last.
        heads: of the attention.
        eps: of the layer norms.
        dtype: of activations and products.
    """

    def __init__(self, layers: Sequence[LayerParameters], *, heads: int, eps: float, dtype: torch.dtype) -> None:
        if not layers:
            raise ValueError("PackedLayers: layers must hold at least one layer, got an empty list")
        inner, hidden = layers[0].intermediate_weight.shape
        if hidden % heads:
            raise ValueError(f"PackedLayers: {heads} heads do not divide the {hidden} elements of a row")
        shapes = ((3 * hidden, hidden), (hidden, hidden), (hidden,), (inner, hidden), (hidden, inner), (hidden,))
        for layer in layers:
            for i, (name, param) in enumerate(zip(layer._fields, layer, strict=True)):
                shape = shapes[i // 2] if i % 2 == 0 else shapes[i // 2][:1]
                checks.tensor("PackedLayers", name, param, shape, checks.FLOATS, like=layers[0].qkv_weight)
        self.layers = [LayerParameters(*(param.detach() for param in layer)) for layer in layers]
        self.hidden, self.inner, self.heads, self.eps, self.dtype = hidden, inner, heads, eps, dtype
        compiled = is_compiled("encoder_layers", layers[0].qkv_weight.device, dtype, head_dim=hidden // heads)
        self.packed = self._pack() if compiled else None
        if self.packed is not None:
            _by_address[self.packed.data_ptr()] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle has the layers, which are packed again: other processors read another order."""
        return partial(PackedLayers, heads=self.heads, eps=self.eps, dtype=self.dtype), (self.layers,)

    @property
    def sizes(self) -> tuple[int, int, int, float]:
        """Numbers of layers, heads and inner elements, and eps."""
        return len(self.layers), self.heads, self.inner, self.eps

    def _pack(self) -> Tensor:
        problem = _problem(self.dtype, self.hidden, *self.sizes)
        size = library().packed_layer_bytes(problem)
        packed = torch.empty(len(self.layers), size, dtype=torch.uint8)
        for layer, to in zip(self.layers, packed, strict=True):
            wide = [param.float() for param in layer]
            addresses = [param.data_ptr() for param in wide]
            library().pack_layer(problem, addresses, to.data_ptr(), torch.get_num_threads())
        return packed


_by_address: WeakValueDictionary[int, PackedLayers] = WeakValueDictionary()


def with_parameters(x: Tensor, packed: Tensor, *others: Any) -> list[Any]:
    """The custom op's arguments with the layers' parameters in place of the packed ones, which one machine reads."""
    return [x, [param for layer in _by_address[packed.data_ptr()].layers for param in layer], *others]


def layers_of(parameters: Sequence[Tensor]) -> list[LayerParameters]:
    """The layers whose parameters these are, one layer after the other."""
    count = len(LayerParameters._fields)
    return [LayerParameters(*parameters[start : start + count]) for start in range(0, len(parameters), count)]


def _problem(
    dtype: torch.dtype,
    hidden: int,
    layers: int,
    heads: int,
    inner: int,
    eps: float,
    cu_seqlens: Tensor | None = None,
    tokens: int = 0,
    max_seqlen: int = 0,
    first_tokens: bool = False,
) -> tuple[Any, ...]:
    """The native EncoderProblem; without a stream it describes the layers alone."""
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    stream = native_calls.address(cu_seqlens), sequences, tokens, max_seqlen, first_tokens
    return native_calls.DTYPE_CODES[dtype], layers, hidden, heads, inner, eps, *stream


@torch.library.custom_op("minbert::encoder_layers", mutates_args=(), device_types="cpu")
@recorded("encoder_layers", inputs=with_parameters)
def _encoder_layers(
    x: Tensor,
    packed: Tensor,
    cu_seqlens: Tensor,
    layers: int,
    heads: int,
    inner: int,
    eps: float,
    max_seqlen: int,
    first_tokens: bool,
) -> Tensor:
    tokens, hidden = x.shape
    problem = _problem(x.dtype, hidden, layers, heads, inner, eps, cu_seqlens, tokens, max_seqlen, first_tokens)
    out, threads = x.new_empty(cu_seqlens.shape[0] - 1 if first_tokens else tokens, hidden), torch.get_num_threads()
    scratch = torch.empty(library().encoder_scratch(problem, threads), dtype=torch.uint8)
    addresses = [tensor.data_ptr() for tensor in (packed, x, out, scratch)]
    if not library().encoder_layers(problem, *addresses, threads):
        checks.cu_seqlens_values("encoder_layers", cu_seqlens, tokens, max_seqlen)
    return out


@_encoder_layers.register_fake
def _(x: Tensor, packed: Tensor, cu_seqlens: Tensor, *others: Any) -> Tensor:
    return x.new_empty(cu_seqlens.shape[0] - 1 if others[-1] else x.shape[0], x.shape[1])


def encoder_layers(
    x: Tensor, layers: PackedLayers, cu_seqlens: Tensor, max_seqlen: int, *, first_tokens: bool = False
) -> Tensor:
    """BERT's layers over the embeddings of a packed stream, without dropout (Devlin et al. 2019, section 3).

    Each layer is attention, then a feed-forward network with GELU, both followed by residual and LayerNorm. No gradient
    goes through it. The compiled code takes float32, and bfloat16 where the processor multiplies it (`native.isa()` is
    avx512bf16), with head dimensions that are multiples of 8 up to 128. It rounds a product's result once, after bias
    and GELU.

    Args:
        x: [N, D], of the layers' dtype.
        cu_seqlens: int32 [S + 1], cumulative sequence lengths from 0 to N.
        max_seqlen: the longest sequence's length in tokens.
        first_tokens: compute the rows of each sequence's first token alone.

    Returns:
        [N, D]; of first tokens [S, D].

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    op = "encoder_layers"
    checks.tensor(op, "x", x, ["N", layers.hidden], [layers.dtype], like=layers.layers[0].qkv_weight)
    checks.cu_seqlens_shape(op, cu_seqlens)
    compiled = is_compiled(op, x.device, x.dtype, head_dim=layers.hidden // layers.heads)
    if compiled and layers.packed is not None:
        return _encoder_layers(x, layers.packed, cu_seqlens, *layers.sizes, max_seqlen, first_tokens)
    checks.cu_seqlens(op, cu_seqlens, x.shape[0], max_seqlen)
    return reference.encoder_layers(x, layers.layers, cu_seqlens, layers.heads, layers.eps, first_tokens)
