"""All layers in one call: as exact as the reference, and each sequence's result depends on nothing but the sequence."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from minbert.kernels import LayerParameters, PackedLayers, encoder_layers, native, reference, use_backend

DTYPES = [torch.float32, torch.bfloat16]
FEW, MANY = [3, 1, 17, 26], [27, 5, 90, 1, 33, 64, 65, 200, 130, 18, 3, 77]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack(layers: int, hidden: int, heads: int, inner: int, dtype: torch.dtype) -> PackedLayers:
    shapes = ((3 * hidden, hidden), (hidden, hidden), (hidden,), (inner, hidden), (hidden, inner), (hidden,))
    parameters = [
        tensor / columns[0] ** 0.5 if columns else tensor
        for seed, (rows, *columns) in enumerate(shapes * layers)
        for tensor in (randn(rows, *columns, seed=2 * seed), randn(rows, seed=2 * seed + 1))
    ]
    return PackedLayers(
        [LayerParameters(*parameters[12 * i : 12 * (i + 1)]) for i in range(layers)],
        heads=heads,
        eps=1e-12,
        dtype=dtype,
    )


def stream(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def needs(isa: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and isa != "avx512bf16":
        pytest.skip(f"{isa} multiplies no bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first_tokens", [False, True])
@pytest.mark.parametrize(("hidden", "heads", "inner"), [(24, 3, 37), (64, 2, 128), (160, 5, 70)])
@pytest.mark.parametrize("lengths", [FEW, MANY])
def test_is_as_near_to_float64_as_the_reference(
    isa: str, lengths: list[int], hidden: int, heads: int, inner: int, first_tokens: bool, dtype: torch.dtype
) -> None:
    needs(isa, dtype)
    layers, x, cu_seqlens = (
        stack(2, hidden, heads, inner, dtype),
        randn(sum(lengths), hidden).to(dtype),
        stream(lengths),
    )
    # what is exact is of the weights that the products read
    rounded = [
        [param.to(dtype).double() if param.ndim > 1 else param.double() for param in layer] for layer in layers.layers
    ]
    exact = reference.encoder_layers(x.double(), rounded, cu_seqlens, heads, layers.eps, False)
    theirs = reference.encoder_layers(x, layers.layers, cu_seqlens, heads, layers.eps, False) - exact
    ours = encoder_layers(x, layers, cu_seqlens, max(lengths), first_tokens=first_tokens)
    assert ours.dtype == dtype
    assert ours.shape == (len(lengths) if first_tokens else sum(lengths), hidden)
    errors = ours - (exact[cu_seqlens[:-1]] if first_tokens else exact)
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert errors.abs().max() <= 2 * theirs.abs().max() + unit
    assert errors.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first_tokens", [False, True])
def test_a_sequence_gives_the_same_bits_alone_and_in_any_batch_by_any_number_of_threads(
    isa: str, first_tokens: bool, dtype: torch.dtype
) -> None:
    needs(isa, dtype)
    layers, x = stack(2, 96, 3, 200, dtype), randn(sum(MANY), 96).to(dtype)
    alone = [
        encoder_layers(part, layers, stream([len(part)]), len(part), first_tokens=first_tokens)
        for part in x.split(MANY)
    ]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.testing.assert_close(
            encoder_layers(x, layers, stream(MANY), max(MANY), first_tokens=first_tokens),
            torch.cat(alone),
            rtol=0,
            atol=0,
        )


def test_parameters_are_packed_once_and_follow_no_change() -> None:
    layers, x = stack(1, 32, 2, 48, torch.float32), randn(3, 32)
    if not native.available():
        pytest.skip(native.missing_reason())
    before = encoder_layers(x, layers, stream([3]), 3)
    layers.layers[0].output_weight.zero_()
    torch.testing.assert_close(encoder_layers(x, layers, stream([3]), 3), before, rtol=0, atol=0)


def test_runs_one_op_where_it_is_compiled_and_the_reference_elsewhere(record, isa: str) -> None:
    for dtype in (*DTYPES, torch.float64):
        layers, x = stack(1, 32, 2, 48, dtype), randn(5, 32).to(dtype)
        compiled = dtype == torch.float32 or (dtype == torch.bfloat16 and isa == "avx512bf16")
        with record() as ops:
            encoder_layers(x, layers, stream([2, 3]), 3)
        assert ("minbert::encoder_layers" in ops) == compiled
        with use_backend("reference"), record() as ops:
            encoder_layers(x, layers, stream([2, 3]), 3)
        assert "minbert::encoder_layers" not in ops


def test_no_gradient_goes_through_it(needs_native: None) -> None:
    layers = stack(1, 32, 2, 48, torch.float32)
    out = encoder_layers(randn(3, 32).requires_grad_(), layers, stream([3]), 3)
    with pytest.raises(RuntimeError, match="encoder_layers"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_messages(backend: str) -> None:
    layers, x = stack(1, 32, 2, 48, torch.float32), randn(5, 32)
    with use_backend(backend):
        with pytest.raises(ValueError, match=r"encoder_layers: x must have shape \[N, 32\], got \[5, 31\]"):
            encoder_layers(randn(5, 31), layers, stream([5]), 5)
        with pytest.raises(TypeError, match="encoder_layers: x must be float32, got bfloat16"):
            encoder_layers(x.bfloat16(), layers, stream([5]), 5)
        with pytest.raises(ValueError, match="encoder_layers: cu_seqlens must end at the number of tokens, 5, got 6"):
            encoder_layers(x, layers, stream([6]), 6)
        with pytest.raises(ValueError, match="encoder_layers: max_seqlen is 4, but the longest sequence has 5 tokens"):
            encoder_layers(x, layers, stream([5]), 4)
    with pytest.raises(ValueError, match="at least one layer"):
        PackedLayers([], heads=1, eps=1e-5, dtype=torch.float32)
    with pytest.raises(ValueError, match="5 heads do not divide the 32"):
        PackedLayers(layers.layers, heads=5, eps=1e-5, dtype=torch.float32)
    (layer,) = layers.layers
    with pytest.raises(ValueError, match=r"PackedLayers: output_weight must have shape \[32, 48\], got \[32, 47\]"):
        PackedLayers([layer._replace(output_weight=randn(32, 47))], heads=2, eps=1e-5, dtype=torch.float32)


def test_pickled_layers_are_packed_again(needs_native: None) -> None:
    layers = stack(2, 32, 2, 48, torch.float32)
    again = pickle.loads(pickle.dumps(layers))
    assert again.packed is not None
    assert torch.equal(again.packed, layers.packed)
    assert again.packed.data_ptr() != layers.packed.data_ptr()
    x, cu_seqlens = torch.ones(5, 32), torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.equal(encoder_layers(x, again, cu_seqlens, 3), encoder_layers(x, layers, cu_seqlens, 3))
