"""Packed weights give the products of plain ones, and are made only where `linear` multiplies by oneDNN."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minbert import kernels
from minbert.kernels import PackedWeight, pack_weight, use_backend, use_matmul

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
libraries = importlib.import_module("minbert.kernels.matmul_library")  # its name in the package is the function's
BF16 = libraries.multiplies_bfloat16()


def inputs(rows: int, columns: int, outputs: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(shape, generator=generator) for shape in ((rows, columns), (outputs, columns), (outputs,))]


def packed(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> PackedWeight:
    with use_matmul("onednn"):
        found = pack_weight(weight, dtype)
    assert isinstance(found, PackedWeight)
    return found


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_products_are_as_exact_as_those_of_plain_weights(dtype, rows, columns, outputs, with_bias):
    if dtype == torch.bfloat16 and not BF16:
        pytest.skip("this processor multiplies no bf16 matrices")
    x, weight, bias = inputs(rows, columns, outputs)
    x, bias = x.to(dtype), bias if with_bias else None
    plain = weight.to(dtype)
    exact = F.linear(x.double(), plain.double(), None if bias is None else bias.to(dtype).double())
    theirs = F.linear(x, plain, None if bias is None else bias.to(dtype))
    ours = kernels.linear(x, packed(weight, dtype), bias)
    assert ours.dtype == dtype
    unit = torch.finfo(dtype).eps * exact.abs().max() * columns**0.5
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + unit


@needs_onednn
def test_parts_give_the_columns_of_the_whole_and_are_packed_once():
    x, weight, bias = inputs(5, 16, 24)
    whole = packed(weight)
    parts = whole.split([8, 16])
    found = [kernels.linear(x, part, of_part) for part, of_part in zip(parts, bias.split([8, 16]), strict=True)]
    torch.testing.assert_close(torch.cat(found, 1), kernels.linear(x, whole, bias))
    assert [part.shape for part in parts] == [(8, 16), (16, 16)]
    assert whole.split((8, 16)) is parts
    assert parts[0].packed is parts[0].packed


@needs_onednn
def test_views_of_one_task_may_be_given_with_it():
    x, weight, bias = inputs(3, 4, 2)
    torch.testing.assert_close(kernels.linear(x, packed(weight), [bias], bounds=[0, 3]), F.linear(x, weight, bias))


@needs_onednn
def test_wrong_arguments_are_named():
    x, weight, bias = inputs(3, 4, 2)
    whole = packed(weight)
    with pytest.raises(ValueError, match=r"^linear: x must have shape \[N, 4\], got \[3, 3\]"):
        kernels.linear(x[:, :3], whole)
    with pytest.raises(TypeError, match=r"^linear: x must be float32, got float64"):
        kernels.linear(x.double(), whole)
    with pytest.raises(ValueError, match=r"^linear: bias must have shape \[2\], got \[1\]"):
        kernels.linear(x, whole, bias[:1])


def test_where_linear_does_not_use_onednn_a_weight_is_cast_alone(monkeypatch):
    weight = torch.ones(4, 4)
    with use_matmul("blas"):
        assert pack_weight(weight, torch.float32).data_ptr() == weight.data_ptr()
    for dtype in (torch.float64, torch.float16):
        assert pack_weight(weight, dtype).dtype == dtype
    assert pack_weight(weight.to("meta"), torch.bfloat16).dtype == torch.bfloat16
    monkeypatch.setattr(libraries, "multiplies_bfloat16", lambda: False)
    assert isinstance(pack_weight(weight, torch.bfloat16), torch.Tensor)
    if torch.backends.mkldnn.is_available():
        with use_matmul("onednn"):
            assert isinstance(pack_weight(weight, torch.float32), PackedWeight)
            with use_backend("reference"):
                assert isinstance(pack_weight(weight, torch.float32), torch.Tensor)


@pytest.mark.skipif(not BF16, reason="this processor multiplies no bf16 matrices")
def test_bf16_weights_are_packed_whatever_library_float32_has():
    with use_matmul("blas"):
        assert pack_weight(torch.ones(4, 4), torch.bfloat16).dtype == torch.bfloat16
        assert isinstance(pack_weight(torch.ones(4, 4), torch.bfloat16), PackedWeight)
